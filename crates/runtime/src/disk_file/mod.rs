//! Opening a disk: a regular file or a block device that one process uses alone.
//!
//! **What it owns.** One open file description, shared by the engines of all lanes of the disk, and
//! on it an exclusive OFD lock: it goes away with the last engine, however the process ends, and
//! never before the last I/O. (A classic POSIX lock would be lost when *any* descriptor of the file
//! is closed in the process.) Block devices are opened with `O_EXCL` as well, which the kernel
//! refuses for mounted devices and members of md or dm.
//!
//! **What it guarantees.** `O_DIRECT` is on if one aligned read through it worked, else off and
//! [`DiskFile::is_direct`] says so. What the disk promises on power loss is found out once, see
//! [`Promise`], always with the reason as a text, and in doubt it promises nothing.
//!
//! **Who calls it.** The store's start-up and `pf disk`; never the I/O path.

mod holder;
mod promise;

use crate::error::RuntimeError;
use promise::Sysfs;
use proto::BLOCK_BYTES;
use proto::buffer::Pool;
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use promise::{Durability, Promise};

/// The open file description of a disk, with its lock.
///
/// The lock is given back explicitly: a child that another thread forks shares the description
/// until its exec, and closing alone would leave the disk locked for as long.
#[derive(Debug)]
pub struct DiskFd(OwnedFd);

/// An open, locked disk. Clones share the descriptor.
#[derive(Clone, Debug)]
pub struct DiskFile {
    fd: Arc<DiskFd>,
    path: PathBuf,
    size_bytes: u64,
    logical_block_bytes: u32,
    partition_start_bytes: u64,
    is_block_device: bool,
    is_direct: bool,
    promise: Promise,
}

/// Space of the file system that holds a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostSpace {
    /// What an unprivileged process can still take.
    pub free_bytes: u64,
    /// Size of the file system.
    pub total_bytes: u64,
}

impl DiskFile {
    /// Open and lock the disk at `path`, which must exist.
    pub fn open(path: &Path) -> Result<DiskFile, RuntimeError> {
        DiskFile::open_with(path, &Sysfs::real())
    }

    fn open_with(path: &Path, sysfs: &Sysfs) -> Result<DiskFile, RuntimeError> {
        let is_block_device = is_block_device(path)?;
        let (fd, mut is_direct) = open_fd(path, is_block_device)?;
        let fd = DiskFd::lock(fd, path)?;
        if is_direct && !can_read(&fd) {
            is_direct = false;
            let flags = rustix::fs::fcntl_getfl(&fd)
                .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags - OFlags::DIRECT));
            flags.map_err(RuntimeError::path("turn O_DIRECT off for", path))?;
        }
        // For a block device the file size in stat is 0; the end of the file is right for both.
        let size_bytes = rustix::fs::seek(&fd, SeekFrom::End(0))
            .map_err(RuntimeError::path("find the size of", path))?;
        let stat = rustix::fs::fstat(&fd).map_err(RuntimeError::path("stat", path))?;
        let (device, logical_block_bytes, file_system) = if is_block_device {
            let bytes = rustix::fs::ioctl_blksszget(&fd)
                .map_err(RuntimeError::path("ask for the sector size of", path))?;
            (stat.st_rdev, bytes, None)
        } else {
            let about = rustix::fs::fstatfs(&fd).map_err(RuntimeError::path("statfs", path))?;
            let block = u32::try_from(about.f_bsize).unwrap_or(u32::MAX);
            let system = promise::FileSystem { magic: about.f_type as u64, block_bytes: block };
            (stat.st_dev, 512, Some(system))
        };
        let device = (rustix::fs::major(device), rustix::fs::minor(device));
        let disk = DiskFile {
            fd: Arc::new(fd),
            path: path.to_owned(),
            size_bytes,
            logical_block_bytes,
            partition_start_bytes: sysfs.partition_start_bytes(device),
            is_block_device,
            is_direct,
            promise: sysfs.promise(device, file_system),
        };
        disk.check_geometry()?;
        Ok(disk)
    }

    fn check_geometry(&self) -> Result<(), RuntimeError> {
        let refuse = |reason| Err(RuntimeError::DiskGeometry { path: self.path.clone(), reason });
        if self.logical_block_bytes as usize > BLOCK_BYTES {
            return refuse(format!("sectors of {} bytes, at most 4096", self.logical_block_bytes));
        }
        if self.is_block_device && !self.partition_start_bytes.is_multiple_of(BLOCK_BYTES as u64) {
            return refuse(format!(
                "the partition starts at byte {}, which is not a multiple of 4096; \
                 re-create it aligned",
                self.partition_start_bytes
            ));
        }
        Ok(())
    }

    /// The descriptor, with the lock, for engines.
    #[must_use]
    pub fn fd(&self) -> &Arc<DiskFd> {
        &self.fd
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size when it was opened.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Sector size of a device; 512 for a file.
    #[must_use]
    pub fn logical_block_bytes(&self) -> u32 {
        self.logical_block_bytes
    }

    /// Where the partition starts on its disk; 0 if it is none. For a file, of what holds it.
    #[must_use]
    pub fn partition_start_bytes(&self) -> u64 {
        self.partition_start_bytes
    }

    /// True if the page cache is bypassed.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// True for a regular file: space that was never written costs file system metadata at its
    /// first write, so the lane materialises it ahead.
    #[must_use]
    pub fn needs_materialising(&self) -> bool {
        !self.is_block_device
    }

    /// What the disk promises on power loss.
    #[must_use]
    pub fn promise(&self) -> &Promise {
        &self.promise
    }

    /// Reserve the space of `len` bytes at `offset` in a regular file, so that no later write can
    /// meet ENOSPC. The space still reads as zeros and is still unwritten for the file system.
    pub fn preallocate(&self, offset: u64, len: u64) -> Result<(), RuntimeError> {
        assert!(!self.is_block_device, "a device has its space");
        rustix::fs::fallocate(&*self.fd, FallocateFlags::KEEP_SIZE, offset, len)
            .map_err(RuntimeError::path("reserve space for", &self.path))
    }

    /// Space of the file system that a regular file lives in; `None` for a device.
    pub fn host_space(&self) -> Result<Option<HostSpace>, RuntimeError> {
        if self.is_block_device {
            return Ok(None);
        }
        let about =
            rustix::fs::fstatvfs(&*self.fd).map_err(RuntimeError::path("statvfs", &self.path))?;
        Ok(Some(HostSpace {
            free_bytes: about.f_bavail.saturating_mul(about.f_frsize),
            total_bytes: about.f_blocks.saturating_mul(about.f_frsize),
        }))
    }
}

/// Make a sparse file of `size_bytes` (a multiple of 4,096), durably, readable by the owner only.
///
/// An existing file is taken if it is empty and nobody has it locked, and refused otherwise.
pub fn create_sparse(path: &Path, size_bytes: u64) -> Result<(), RuntimeError> {
    assert!(size_bytes > 0 && size_bytes.is_multiple_of(BLOCK_BYTES as u64), "{size_bytes} bytes");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(RuntimeError::path("create", path))?;
    let fd = DiskFd::lock(fd, path)?;
    // Looked at under the lock: of two creators one finds the other's work.
    let stat = rustix::fs::fstat(&fd).map_err(RuntimeError::path("stat", path))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(RuntimeError::NotADisk { path: path.to_owned() });
    }
    let held = u64::try_from(stat.st_size).expect("the kernel reports no negative size");
    if held > 0 {
        return Err(RuntimeError::DiskNotEmpty { path: path.to_owned(), size_bytes: held });
    }
    rustix::fs::ftruncate(&fd, size_bytes).map_err(RuntimeError::path("size", path))?;
    rustix::fs::fsync(&fd).map_err(RuntimeError::path("fsync", path))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let folder = rustix::fs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
    folder
        .and_then(|folder| rustix::fs::fsync(&folder))
        .map_err(RuntimeError::path("make the name durable in", parent))
}

fn is_block_device(path: &Path) -> Result<bool, RuntimeError> {
    let stat = rustix::fs::stat(path).map_err(RuntimeError::path("open", path))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(false),
        FileType::BlockDevice => Ok(true),
        FileType::Directory
        | FileType::Symlink
        | FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::Unknown => Err(RuntimeError::NotADisk { path: path.to_owned() }),
    }
}

/// Open for reading and writing, with O_DIRECT if the file system takes the flag.
fn open_fd(path: &Path, is_block_device: bool) -> Result<(OwnedFd, bool), RuntimeError> {
    let mut flags = OFlags::RDWR | OFlags::CLOEXEC;
    if is_block_device {
        flags |= OFlags::EXCL;
    }
    let fail = |errno: Errno| match errno {
        Errno::BUSY => RuntimeError::DiskHeld {
            path: path.to_owned(),
            holder: "it is mounted, part of md or dm, or open in another process".to_owned(),
        },
        other => RuntimeError::path("open", path)(other),
    };
    match rustix::fs::open(path, flags | OFlags::DIRECT, Mode::empty()) {
        Ok(fd) => Ok((fd, true)),
        Err(Errno::INVAL) => {
            rustix::fs::open(path, flags, Mode::empty()).map(|fd| (fd, false)).map_err(fail)
        }
        Err(errno) => Err(fail(errno)),
    }
}

/// Try one aligned read. A file that is still empty answers, too.
fn can_read(fd: &DiskFd) -> bool {
    let mut block = Pool::new(0).alloc(BLOCK_BYTES);
    // EIO in the first block is the disk's fault and no reason to go through the page cache.
    !matches!(rustix::io::pread(fd, &mut block[..], 0), Err(Errno::INVAL | Errno::OPNOTSUPP))
}

impl DiskFd {
    /// Take the exclusive lock of this open file description, without waiting.
    fn lock(fd: OwnedFd, path: &Path) -> Result<DiskFd, RuntimeError> {
        let error = match set_lock(&fd, libc::F_WRLCK) {
            Ok(()) => return Ok(DiskFd(fd)),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Err(RuntimeError::DiskHeld {
                path: path.to_owned(),
                holder: holder::find(fd.as_fd()),
            }),
            _ => Err(RuntimeError::PathFailed {
                action: "lock",
                path: path.to_owned(),
                source: error,
            }),
        }
    }
}

impl Drop for DiskFd {
    fn drop(&mut self) {
        // The close that follows unlocks as well, if later; there is nothing to do about an error.
        let _ = set_lock(&self.0, libc::F_UNLCK);
    }
}

impl AsFd for DiskFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn set_lock(fd: &OwnedFd, kind: libc::c_int) -> io::Result<()> {
    let whole_file = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: F_OFD_SETLK reads one `struct flock`, which lives across the call.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &whole_file) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
pub(crate) mod tests;
