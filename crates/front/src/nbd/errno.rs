//! The error values that NBD knows, and which one each status becomes.

use proto::Status;

/// "Error values".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted.
    Eperm = 1,
    /// Input/output error.
    Eio = 5,
    /// Invalid argument.
    Einval = 22,
    /// No space left on device.
    Enospc = 28,
    /// The server, or this attachment of the volume, is coming to its end.
    Eshutdown = 108,
}

impl Errno {
    /// What the client is told for the failure of a request that was right.
    ///
    /// Panics for [`Status::Ok`], which is no failure.
    #[must_use]
    pub fn of(status: Status) -> Errno {
        match status {
            Status::Ok => panic!("a request that succeeded has no errno"),
            Status::ReadOnly | Status::Denied | Status::Unauthenticated => Errno::Eperm,
            Status::Invalid
            | Status::OutOfRange
            | Status::Misaligned
            | Status::Limit
            | Status::Unsupported => Errno::Einval,
            Status::NoSpace => Errno::Enospc,
            // A newer attach owns the volume. "If the client receives an ESHUTDOWN error it MUST
            // initiate a soft disconnect": just what it has to do.
            Status::Fenced => Errno::Eshutdown,
            // The session retries what can be retried; what still arrives here is final.
            Status::StaleEpoch
            | Status::NotPrimary
            | Status::Busy
            | Status::Cancelled
            | Status::NotFound
            | Status::AlreadyExists
            | Status::InUse
            | Status::Unsafe
            | Status::MediaError
            | Status::BadChecksum
            | Status::DiskFailed
            | Status::Unavailable
            | Status::NoQuorum
            | Status::TimedOut
            | Status::WrongCluster
            | Status::Internal => Errno::Eio,
        }
    }
}
