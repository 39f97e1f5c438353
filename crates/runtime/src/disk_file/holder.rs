//! Who has the lock? `F_OFD_GETLK` does not tell: such a lock belongs to an open file, not to a
//! process. But `/proc/PID/fdinfo/FD` lists the locks of each open file, with the inode.

use std::fs;
use std::os::fd::BorrowedFd;

/// Descriptors looked at before the search is given up: it serves an error message only.
const LOOKS_MAX: usize = 100_000;

/// Name the process that has the file behind `fd` locked, as far as `/proc` shows it to us.
pub(super) fn find(fd: BorrowedFd<'_>) -> String {
    let unknown = || "another process holds its lock (not visible in /proc)".to_owned();
    let Ok(stat) = rustix::fs::fstat(fd) else { return unknown() };
    let inode = format!(":{} ", stat.st_ino);
    let mut looks = 0;
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        for info in fs::read_dir(process.path().join("fdinfo")).into_iter().flatten().flatten() {
            looks += 1;
            if looks > LOOKS_MAX {
                return unknown();
            }
            let Ok(text) = fs::read_to_string(info.path()) else { continue };
            let is_holder = |line: &str| {
                line.starts_with("lock:") && line.contains("OFDLCK") && line.contains(&inode)
            };
            if text.lines().any(is_holder) {
                return describe(pid);
            }
        }
    }
    unknown()
}

fn describe(pid: u32) -> String {
    if pid == std::process::id() {
        return format!("this process ({pid}) has it open already");
    }
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("process {pid} ({}) holds its lock", name.trim())
}
