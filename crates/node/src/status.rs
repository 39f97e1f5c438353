//! From the causes that machines name to the codes that users and peers see.

use crate::direct::DirectProblem;
use crate::disk::DiskProblem;
use lane::Problem;
use proto::Status;
use runtime::RuntimeError;

/// The code of a lane's problem.
#[must_use]
pub fn of_lane(problem: &Problem) -> Status {
    shard::client::status_of(problem)
}

/// The code of a disk that cannot be formatted, inspected or opened.
#[must_use]
pub fn of_disk(problem: &DiskProblem) -> Status {
    match problem {
        DiskProblem::Runtime(RuntimeError::DiskHeld { .. }) => Status::InUse,
        DiskProblem::Runtime(RuntimeError::DiskNotEmpty { .. })
        | DiskProblem::AlreadyFormatted { .. } => Status::AlreadyExists,
        DiskProblem::Runtime(
            RuntimeError::PathFailed { .. }
            | RuntimeError::SystemFailed { .. }
            | RuntimeError::NotADisk { .. }
            | RuntimeError::DiskGeometry { .. },
        )
        | DiskProblem::Format { .. } => Status::Invalid,
        DiskProblem::Io { .. } => Status::MediaError,
        DiskProblem::WrongCluster { .. } => Status::WrongCluster,
        DiskProblem::Truncated { .. } | DiskProblem::Lane { .. } => Status::DiskFailed,
    }
}

/// The code of a direct operation's problem.
#[must_use]
pub fn of_direct(problem: &DirectProblem) -> Status {
    match problem {
        DirectProblem::Lane(problem) => of_lane(problem),
        DirectProblem::Disk(problem) => of_disk(problem),
        DirectProblem::Closed => Status::Unavailable,
        DirectProblem::Busy => Status::Busy,
    }
}
