//! Status codes of replies, in bands that say how to react.
//!
//! Generated from errors.toml by tools/gen_errors.py; edit the list, not this file.

use std::fmt;

/// How to react to a code without knowing it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Band {
    /// Success.
    Ok,
    /// Retry, or ask another replica; nothing is wrong with the request.
    Route,
    /// The request cannot be carried out as it stands.
    Caller,
    /// Space or media: a disk is full, failing or returned wrong data.
    Media,
    /// The cluster cannot serve this now.
    Cluster,
    /// The caller is unknown or may not do this.
    Security,
    /// The version in use cannot do it, or has a bug.
    Software,
}

/// What became of a request. The number is what travels.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The request names an older configuration of the shard.
    StaleEpoch = 1,
    /// A newer attach took the volume over; this session may not write.
    Fenced = 2,
    /// This replica is not the shard's primary.
    NotPrimary = 3,
    /// A queue is full; the request was not started.
    Busy = 4,
    /// The request was dropped before it took effect.
    Cancelled = 5,
    /// A field has a value that is never allowed.
    Invalid = 20,
    /// The range lies outside the volume or the shard.
    OutOfRange = 21,
    /// Offset or length is not a multiple of 512 bytes.
    Misaligned = 22,
    /// There is no object of this name or id.
    NotFound = 23,
    /// An object of this name exists.
    AlreadyExists = 24,
    /// The object is attached or another object depends on it.
    InUse = 25,
    /// The object cannot be written: a snapshot or a read-only attach.
    ReadOnly = 26,
    /// A named limit would be exceeded.
    Limit = 27,
    /// It could lose or fork data, and nothing proves that it does not.
    Unsafe = 28,
    /// No space is left for new data; overwrites still work.
    NoSpace = 40,
    /// No replica could read or write the data on its disk.
    MediaError = 41,
    /// The data does not match its checksum and was not used.
    BadChecksum = 42,
    /// The disk stopped after a failed flush or journal write.
    DiskFailed = 43,
    /// The service or the store is not reachable or not ready.
    Unavailable = 60,
    /// Too few members are present to decide safely.
    NoQuorum = 61,
    /// No answer came in time; the outcome is not known.
    TimedOut = 62,
    /// The other side belongs to a different cluster.
    WrongCluster = 63,
    /// The caller did not prove who it is.
    Unauthenticated = 80,
    /// The caller is known but has no right to do this.
    Denied = 81,
    /// This version does not have the operation or feature.
    Unsupported = 90,
    /// A bug in PureFlash.
    Internal = 99,
}

/// A number that is no status of this version.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("unknown status {0}")]
pub struct UnknownStatus(pub u32);

impl Status {
    /// Every status, by ascending number.
    pub const ALL: [Status; 27] = [
        Status::Ok,
        Status::StaleEpoch,
        Status::Fenced,
        Status::NotPrimary,
        Status::Busy,
        Status::Cancelled,
        Status::Invalid,
        Status::OutOfRange,
        Status::Misaligned,
        Status::NotFound,
        Status::AlreadyExists,
        Status::InUse,
        Status::ReadOnly,
        Status::Limit,
        Status::Unsafe,
        Status::NoSpace,
        Status::MediaError,
        Status::BadChecksum,
        Status::DiskFailed,
        Status::Unavailable,
        Status::NoQuorum,
        Status::TimedOut,
        Status::WrongCluster,
        Status::Unauthenticated,
        Status::Denied,
        Status::Unsupported,
        Status::Internal,
    ];

    /// The number that travels.
    #[must_use]
    pub fn number(self) -> u32 {
        self as u32
    }

    /// How to react.
    #[must_use]
    pub fn band(self) -> Band {
        match self {
            Status::Ok => Band::Ok,
            Status::StaleEpoch => Band::Route,
            Status::Fenced => Band::Route,
            Status::NotPrimary => Band::Route,
            Status::Busy => Band::Route,
            Status::Cancelled => Band::Route,
            Status::Invalid => Band::Caller,
            Status::OutOfRange => Band::Caller,
            Status::Misaligned => Band::Caller,
            Status::NotFound => Band::Caller,
            Status::AlreadyExists => Band::Caller,
            Status::InUse => Band::Caller,
            Status::ReadOnly => Band::Caller,
            Status::Limit => Band::Caller,
            Status::Unsafe => Band::Caller,
            Status::NoSpace => Band::Media,
            Status::MediaError => Band::Media,
            Status::BadChecksum => Band::Media,
            Status::DiskFailed => Band::Media,
            Status::Unavailable => Band::Cluster,
            Status::NoQuorum => Band::Cluster,
            Status::TimedOut => Band::Cluster,
            Status::WrongCluster => Band::Cluster,
            Status::Unauthenticated => Band::Security,
            Status::Denied => Band::Security,
            Status::Unsupported => Band::Software,
            Status::Internal => Band::Software,
        }
    }

    /// Stable name, as in REST and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "OK",
            Status::StaleEpoch => "STALE_EPOCH",
            Status::Fenced => "FENCED",
            Status::NotPrimary => "NOT_PRIMARY",
            Status::Busy => "BUSY",
            Status::Cancelled => "CANCELLED",
            Status::Invalid => "INVALID",
            Status::OutOfRange => "OUT_OF_RANGE",
            Status::Misaligned => "MISALIGNED",
            Status::NotFound => "NOT_FOUND",
            Status::AlreadyExists => "ALREADY_EXISTS",
            Status::InUse => "IN_USE",
            Status::ReadOnly => "READ_ONLY",
            Status::Limit => "LIMIT",
            Status::Unsafe => "UNSAFE",
            Status::NoSpace => "NO_SPACE",
            Status::MediaError => "MEDIA_ERROR",
            Status::BadChecksum => "BAD_CHECKSUM",
            Status::DiskFailed => "DISK_FAILED",
            Status::Unavailable => "UNAVAILABLE",
            Status::NoQuorum => "NO_QUORUM",
            Status::TimedOut => "TIMED_OUT",
            Status::WrongCluster => "WRONG_CLUSTER",
            Status::Unauthenticated => "UNAUTHENTICATED",
            Status::Denied => "DENIED",
            Status::Unsupported => "UNSUPPORTED",
            Status::Internal => "INTERNAL",
        }
    }

    /// What is true.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Status::Ok => "Done",
            Status::StaleEpoch => "The request names an older configuration of the shard",
            Status::Fenced => "A newer attach took the volume over; this session may not write",
            Status::NotPrimary => "This replica is not the shard's primary",
            Status::Busy => "A queue is full; the request was not started",
            Status::Cancelled => "The request was dropped before it took effect",
            Status::Invalid => "A field has a value that is never allowed",
            Status::OutOfRange => "The range lies outside the volume or the shard",
            Status::Misaligned => "Offset or length is not a multiple of 512 bytes",
            Status::NotFound => "There is no object of this name or id",
            Status::AlreadyExists => "An object of this name exists",
            Status::InUse => "The object is attached or another object depends on it",
            Status::ReadOnly => "The object cannot be written: a snapshot or a read-only attach",
            Status::Limit => "A named limit would be exceeded",
            Status::Unsafe => "It could lose or fork data, and nothing proves that it does not",
            Status::NoSpace => "No space is left for new data; overwrites still work",
            Status::MediaError => "No replica could read or write the data on its disk",
            Status::BadChecksum => "The data does not match its checksum and was not used",
            Status::DiskFailed => "The disk stopped after a failed flush or journal write",
            Status::Unavailable => "The service or the store is not reachable or not ready",
            Status::NoQuorum => "Too few members are present to decide safely",
            Status::TimedOut => "No answer came in time; the outcome is not known",
            Status::WrongCluster => "The other side belongs to a different cluster",
            Status::Unauthenticated => "The caller did not prove who it is",
            Status::Denied => "The caller is known but has no right to do this",
            Status::Unsupported => "This version does not have the operation or feature",
            Status::Internal => "A bug in PureFlash",
        }
    }

    /// What to do now.
    #[must_use]
    pub fn next_step(self) -> &'static str {
        match self {
            Status::Ok => "Nothing to do",
            Status::StaleEpoch => "Fetch the shard's configuration and send the request again",
            Status::Fenced => "Attach again, if the newer user of the volume is done with it",
            Status::NotPrimary => "Send the request to the primary of the current configuration",
            Status::Busy => "Send it again after a short pause",
            Status::Cancelled => "Send it again if it is still wanted",
            Status::Invalid => "Correct the field named in the message",
            Status::OutOfRange => "Check offset and length against the volume's size",
            Status::Misaligned => "Align the request to 512 bytes, or better to 4096",
            Status::NotFound => "List the objects; names are case-sensitive",
            Status::AlreadyExists => "Choose another name or use the existing object",
            Status::InUse => "Detach it or remove what depends on it, then try again",
            Status::ReadOnly => "Clone the snapshot, or attach the volume for writing",
            Status::Limit => "See docs/reference/limits.md for the limit named in the message",
            Status::Unsafe => "Do what the message names first, or leave it as it is",
            Status::NoSpace => "Delete or discard data, or add a disk",
            Status::MediaError => "See `pf status` for the failing disk and restore what is lost",
            Status::BadChecksum => "Send it again; if it persists run `pf doctor`",
            Status::DiskFailed => "Replace the disk; copies in sync on other stores go on serving",
            Status::Unavailable => "Try again; `pf status` names the missing part",
            Status::NoQuorum => "Bring the missing stores or metastore members back",
            Status::TimedOut => "Read the object back before trying again",
            Status::WrongCluster => "Check the address and the context that was used",
            Status::Unauthenticated => "Use a valid token or attach again for a fresh ticket",
            Status::Denied => "Ask whoever runs the cluster for the right",
            Status::Unsupported => "Compare the versions with `pf version` and upgrade the older",
            Status::Internal => "Report it with the output of `pf doctor` and `pf logs`",
        }
    }
}

impl TryFrom<u32> for Status {
    type Error = UnknownStatus;

    fn try_from(number: u32) -> Result<Status, UnknownStatus> {
        match number {
            0 => Ok(Status::Ok),
            1 => Ok(Status::StaleEpoch),
            2 => Ok(Status::Fenced),
            3 => Ok(Status::NotPrimary),
            4 => Ok(Status::Busy),
            5 => Ok(Status::Cancelled),
            20 => Ok(Status::Invalid),
            21 => Ok(Status::OutOfRange),
            22 => Ok(Status::Misaligned),
            23 => Ok(Status::NotFound),
            24 => Ok(Status::AlreadyExists),
            25 => Ok(Status::InUse),
            26 => Ok(Status::ReadOnly),
            27 => Ok(Status::Limit),
            28 => Ok(Status::Unsafe),
            40 => Ok(Status::NoSpace),
            41 => Ok(Status::MediaError),
            42 => Ok(Status::BadChecksum),
            43 => Ok(Status::DiskFailed),
            60 => Ok(Status::Unavailable),
            61 => Ok(Status::NoQuorum),
            62 => Ok(Status::TimedOut),
            63 => Ok(Status::WrongCluster),
            80 => Ok(Status::Unauthenticated),
            81 => Ok(Status::Denied),
            90 => Ok(Status::Unsupported),
            99 => Ok(Status::Internal),
            unknown => Err(UnknownStatus(unknown)),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name(), self.meaning())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_and_nothing_else_is_a_status() {
        let known: Vec<u32> = Status::ALL.iter().map(|status| status.number()).collect();
        for number in 0..200 {
            match Status::try_from(number) {
                Ok(status) => assert_eq!(status.number(), number),
                Err(unknown) => {
                    assert!(!known.contains(&number), "{number} was refused");
                    assert_eq!(unknown, UnknownStatus(number));
                }
            }
        }
    }

    #[test]
    fn only_ok_is_in_the_band_of_success() {
        for status in Status::ALL {
            assert_eq!(status.band() == Band::Ok, status == Status::Ok, "{status}");
        }
    }
}
