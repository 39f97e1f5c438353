//! What can go wrong when the world is opened: files, devices, sockets, threads. Faults of single
//! I/Os are not here; they travel as `proto::disk::DiskError` and `reactor::CloseReason`.

use std::io;
use std::path::PathBuf;

/// Failure of a set-up operation. The text says what failed, why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// An operation of the operating system on a path failed.
    #[error("cannot {action} {path}: {source}")]
    PathFailed {
        /// What was tried, as a verb phrase.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The reason given.
        source: io::Error,
    },
    /// The same without a path.
    #[error("cannot {action}: {source}")]
    SystemFailed {
        /// What was tried, as a verb phrase.
        action: &'static str,
        /// The reason given.
        source: io::Error,
    },
    /// The path is neither a regular file nor a block device.
    #[error("{path} is neither a regular file nor a block device")]
    NotADisk {
        /// The path.
        path: PathBuf,
    },
    /// Somebody else has the disk.
    #[error("{path} is in use: {holder}; stop it, or name another disk")]
    DiskHeld {
        /// The path.
        path: PathBuf,
        /// Who, as far as the kernel tells.
        holder: String,
    },
    /// A file that was to be created holds data already.
    #[error("{path} exists and holds {size_bytes} bytes; remove it, or name another file")]
    DiskNotEmpty {
        /// The path.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// The geometry rules out power-fail atomic 4 KiB blocks.
    #[error("{path} cannot be used: {reason}")]
    DiskGeometry {
        /// The path.
        path: PathBuf,
        /// The value found and the value needed.
        reason: String,
    },
}

impl RuntimeError {
    pub(crate) fn path(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(rustix::io::Errno) -> RuntimeError {
        let path = path.into();
        move |errno| RuntimeError::PathFailed { action, path, source: errno.into() }
    }

    pub(crate) fn system<E: Into<io::Error>>(
        action: &'static str,
    ) -> impl FnOnce(E) -> RuntimeError {
        move |source| RuntimeError::SystemFailed { action, source: source.into() }
    }
}
