//! Opening real files; devices and machines that we do not have are imitated in `promise`.

use super::*;
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A folder of this test alone, removed at its end. Under the build directory: on a disk, not
/// tmpfs.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        let base = std::env::current_exe().expect("own path");
        let base = base.parent().expect("a folder").join("runtime-tests");
        let path = base.join(format!("{}-{serial}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder for the test");
        Folder(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_created_file_opens_with_its_size_and_takes_no_space() {
    let folder = Folder::new();
    let path = folder.path("disk0.img");
    create_sparse(&path, 1 << 30).expect("created");
    let disk = DiskFile::open(&path).expect("opened");
    assert_eq!(disk.size_bytes(), 1 << 30);
    assert!(disk.needs_materialising());
    assert_eq!(disk.logical_block_bytes(), 512);
    assert!(!disk.promise().reason.is_empty());
    let used = || rustix::fs::fstat(&**disk.fd()).expect("stat").st_blocks as u64 * 512;
    assert!(used() < 1 << 20, "{} bytes used", used());
    disk.preallocate(0, 8 << 20).expect("reserved");
    assert!(used() >= 8 << 20);
    assert_eq!(DiskFile::open(&folder.path("none")).expect_err("no such file").to_string(), {
        let path = folder.path("none");
        format!("cannot open {}: No such file or directory (os error 2)", path.display())
    });
    let space = disk.host_space().expect("statvfs").expect("a file has a host");
    assert!(space.free_bytes > 0 && space.free_bytes <= space.total_bytes);
}

#[test]
fn a_file_with_content_is_not_overwritten() {
    let folder = Folder::new();
    let path = folder.path("disk0.img");
    fs::write(&path, b"precious").expect("written");
    let refused = create_sparse(&path, 1 << 20).expect_err("it holds data");
    assert!(matches!(refused, RuntimeError::DiskNotEmpty { size_bytes: 8, .. }), "{refused}");
    assert_eq!(fs::read(&path).expect("read"), b"precious");
}

#[test]
fn what_is_no_disk_is_refused() {
    for path in ["/dev/null", "/"] {
        let refused = DiskFile::open(Path::new(path)).expect_err("no disk");
        assert!(matches!(refused, RuntimeError::NotADisk { .. }), "{refused}");
    }
}

#[test]
fn the_second_opener_is_told_who_has_the_disk() {
    let folder = Folder::new();
    let path = folder.path("disk0.img");
    create_sparse(&path, 1 << 20).expect("created");
    let first = DiskFile::open(&path).expect("opened");
    let lane = Arc::clone(first.fd());
    drop(first);
    let refused = DiskFile::open(&path).expect_err("an engine still has the lock").to_string();
    assert!(refused.contains("this process"), "{refused}");
    drop(lane);
    drop(DiskFile::open(&path).expect("free again"));
}

const CHILD: &str = "PUREFLASH_TEST_LOCK_CHILD";

/// The holder is a child running this same test; it is told to go by closing its stdin.
#[test]
fn a_disk_of_another_process_is_refused_with_its_pid() {
    if let Some(path) = std::env::var_os(CHILD) {
        let _disk = DiskFile::open(Path::new(&path)).expect("opened by the child");
        println!("locked");
        io::stdout().flush().expect("stdout");
        io::stdin().read_line(&mut String::new()).expect("stdin");
        return;
    }
    let folder = Folder::new();
    let path = folder.path("disk0.img");
    create_sparse(&path, 1 << 20).expect("created");
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "disk_file::tests::a_disk_of_another_process_is_refused_with_its_pid"])
        .arg("--nocapture")
        .env(CHILD, &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the child starts");
    let mut said = io::BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("locked") {
        line.clear();
        let bytes = io::BufRead::read_line(&mut said, &mut line).expect("stdout of the child");
        assert!(bytes > 0, "the child ended without taking the lock");
    }
    let refused = DiskFile::open(&path).expect_err("the child has it").to_string();
    assert!(refused.contains(&format!("process {} (", child.id())), "{refused}");
    assert!(create_sparse(&path, 1 << 20).is_err(), "neither can it be created anew");
    drop(child.stdin.take());
    assert!(child.wait().expect("waited").success());
    DiskFile::open(&path).expect("the lock went with the process");
}

impl DiskFile {
    /// The same disk behind another descriptor.
    pub(crate) fn with_fd(&self, fd: DiskFd) -> DiskFile {
        DiskFile { fd: Arc::new(fd), ..self.clone() }
    }
}

impl DiskFd {
    /// Any descriptor, as an engine wants it.
    pub(crate) fn unlocked(fd: impl Into<OwnedFd>) -> DiskFd {
        DiskFd(fd.into())
    }
}
