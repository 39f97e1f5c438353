//! Threads whose panic ends the process.
//!
//! A dead lane in a living process would keep its peers waiting and, worse, keep its lease. So no
//! thread of the data path dies alone: a panic is logged (the default hook has printed message and
//! place) and the process aborts; the supervisor starts a fresh incarnation.

use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{Builder, JoinHandle};

/// Start a thread named `name` (at most 15 bytes are visible in `ps -L`) running `body`.
pub fn spawn<F>(name: &str, body: F) -> io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    let label = name.to_owned();
    Builder::new().name(label.clone()).spawn(move || abort_on_panic(&label, body))
}

/// Run `body`; if it panics, say so on stderr and abort the process.
pub fn abort_on_panic<T>(label: &str, body: impl FnOnce() -> T) -> T {
    // AssertUnwindSafe: nothing is looked at after a panic, the process ends here.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(value) => value,
        Err(_) => {
            let _ = writeln!(io::stderr(), "pureflash: thread '{label}' panicked: aborting");
            std::process::abort()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    const CHILD: &str = "PUREFLASH_TEST_PANIC_CHILD";

    /// The panic has to be seen from outside, so this test runs itself as a child process.
    #[test]
    fn a_panic_in_one_thread_aborts_the_process() {
        if std::env::var_os(CHILD).is_some() {
            let dying = spawn("lane-7", || panic!("a bug of ours")).expect("a thread");
            let _ = dying.join();
            unreachable!("the process has aborted");
        }
        let output = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "thread::tests::a_panic_in_one_thread_aborts_the_process"])
            .arg("--nocapture")
            .env(CHILD, "1")
            .output()
            .expect("the child runs");
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("thread 'lane-7' panicked: aborting"), "{said}");
        assert!(said.contains("a bug of ours"), "{said}");
    }
}
