//! Disks as a store node sees them: format one, look at one, open one with recovery.
//!
//! Everything here happens before a lane serves, on the calling thread, with blocking I/O; an error
//! names the disk, what was found and what to do.

use lane::format::{DiskHeader, Durability, FormatError, HEADER_BYTES, Uuid};
use lane::recover::{Mounted, RecoveryReport};
use lane::{Fault, FormatRequest, Mount, MountParameters, MountStep, Mutant, format_disk};
use proto::disk::{DiskError, DiskOp};
use proto::{BLOCK_BYTES, Buf, Pool};
use runtime::disk_file::{self, Durability as Promised};
use runtime::{DiskFile, RuntimeError, blocking};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes of one write while areas are filled with zeros.
const ZERO_BYTES: u64 = 1 << 20;
/// How long a store waits for the lock of a disk.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// Pause between two tries.
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Most lanes that a disk gets when it is formatted.
const LANES_FORMATTED: usize = 4;

/// Why a disk cannot be formatted, inspected or opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskProblem {
    /// The operating system.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A read or write failed.
    #[error("{path}: {error}")]
    Io {
        /// The disk.
        path: PathBuf,
        /// What the device said.
        error: DiskError,
    },
    /// The bytes are not what they should be.
    #[error("{path}: {problem}")]
    Format {
        /// The disk.
        path: PathBuf,
        /// What is wrong with them.
        problem: FormatError,
    },
    /// It holds a PureFlash disk already.
    #[error(
        "{path} is formatted already (disk {disk}, cluster {cluster}); remove the file, or `pf disk remove` it first"
    )]
    AlreadyFormatted {
        /// The disk.
        path: PathBuf,
        /// Its identity.
        disk: String,
        /// Its cluster.
        cluster: String,
    },
    /// It belongs to somebody else.
    #[error(
        "{path} belongs to cluster {found}, this store to {expected}: it was not touched; \
             check the path in the store's configuration"
    )]
    WrongCluster {
        /// The disk.
        path: PathBuf,
        /// On the disk.
        found: String,
        /// Of the store.
        expected: String,
    },
    /// The file or device shrank.
    #[error("{path} has {found} bytes, its header says {expected}: it was truncated or replaced")]
    Truncated {
        /// The disk.
        path: PathBuf,
        /// Now.
        found: u64,
        /// When it was formatted.
        expected: u64,
    },
    /// A lane cannot be recovered.
    #[error("{path}, lane {lane}: {fault}")]
    Lane {
        /// The disk.
        path: PathBuf,
        /// Which lane.
        lane: usize,
        /// Why.
        fault: Fault,
    },
}

/// How to format.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Create a sparse file of this size when the path does not exist.
    pub size_bytes: Option<u64>,
    /// The cluster it will belong to.
    pub cluster_id: Uuid,
    /// Journal per lane; the default for the size when `None`.
    pub journal_bytes: Option<u64>,
    /// Override of the detected durability.
    pub durability: Option<Durability>,
}

/// A 128-bit random identity.
#[must_use]
pub fn random_uuid() -> Uuid {
    let mut uuid = [0; 16];
    getrandom::fill(&mut uuid).expect("the kernel gives random bytes");
    uuid
}

/// A 64-bit random number: nonces and incarnations.
#[must_use]
pub fn random_u64() -> u64 {
    getrandom::u64().expect("the kernel gives random bytes")
}

/// Lower-case hexadecimal digits of an identity.
#[must_use]
pub fn hex(uuid: &Uuid) -> String {
    uuid.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Format the disk at `path`; a missing file is created sparse.
pub fn format(path: &Path, options: &FormatOptions) -> Result<DiskHeader, DiskProblem> {
    let refuse = |problem| DiskProblem::Format { path: path.to_owned(), problem };
    if let Some(size_bytes) = options.size_bytes.filter(|_| !path.exists()) {
        if !size_bytes.is_multiple_of(BLOCK_BYTES as u64) {
            return Err(refuse(FormatError::Field {
                what: "disk",
                field: "size",
                value: size_bytes,
                expected: "a multiple of 4,096 bytes",
            }));
        }
        // A size that cannot be formatted leaves no file behind.
        format_disk(&plan_request(size_bytes, options)).map_err(refuse)?;
        disk_file::create_sparse(path, size_bytes)?;
    }
    let disk = DiskFile::open(path)?;
    let pool = Pool::new(4 << 20);
    if let Ok(header) = read_header(&disk, &pool) {
        return Err(DiskProblem::AlreadyFormatted {
            path: path.to_owned(),
            disk: hex(&header.disk_uuid),
            cluster: hex(&header.cluster_id),
        });
    }
    let detected = durability(&disk);
    let plan = format_disk(&FormatRequest {
        durability: options.durability.unwrap_or(detected),
        atomic_bytes: disk.promise().atomic_bytes,
        sparse: disk.needs_materialising(),
        ..plan_request(disk.size_bytes(), options)
    })
    .map_err(refuse)?;
    let zero = pool.zeroed(ZERO_BYTES as usize).freeze();
    for &(start, len) in &plan.zeroes {
        for offset in (start..start + len).step_by(ZERO_BYTES as usize) {
            let count = ZERO_BYTES.min(start + len - offset) as usize;
            let data = proto::block::single(zero.slice(0..count));
            execute(&disk, &pool, &DiskOp::Write { offset, data })?;
        }
    }
    execute(&disk, &pool, &DiskOp::Flush)?;
    for group in [&plan.structures, &plan.headers] {
        for (offset, bytes) in group {
            let data = proto::block::single(pool.copy_of(bytes).freeze());
            execute(&disk, &pool, &DiskOp::Write { offset: *offset, data })?;
        }
        execute(&disk, &pool, &DiskOp::Flush)?;
    }
    Ok(plan.header)
}

/// What is asked for, with the cautious answers to what only the disk can tell.
fn plan_request(size: u64, options: &FormatOptions) -> FormatRequest {
    FormatRequest {
        size,
        cluster_id: options.cluster_id,
        disk_uuid: random_uuid(),
        format_uuid: random_uuid(),
        lane_uuids: (0..LANES_FORMATTED).map(|_| random_uuid()).collect(),
        journal_bytes: options.journal_bytes,
        durability: options.durability.unwrap_or(Durability::Volatile),
        durability_override: options.durability.is_some(),
        atomic_bytes: 512,
        sparse: true,
    }
}

fn durability(disk: &DiskFile) -> Durability {
    match disk.promise().durability {
        Promised::PowerLossProtected => Durability::Plp,
        Promised::Volatile => Durability::Volatile,
    }
}

fn execute(disk: &DiskFile, pool: &Pool, op: &DiskOp) -> Result<Option<Buf>, DiskProblem> {
    blocking::execute(disk, pool, op)
        .map_err(|error| DiskProblem::Io { path: disk.path().to_owned(), error })
}

/// Read the header by majority of its three copies.
pub fn read_header(disk: &DiskFile, pool: &Pool) -> Result<DiskHeader, DiskProblem> {
    let path = || disk.path().to_owned();
    let mut copies = Vec::new();
    let mut failed = None;
    // Without a good header the end is where the file ends.
    for offset in DiskHeader::places(disk.size_bytes().max(4 << 20)) {
        match execute(disk, pool, &DiskOp::Read { offset, len: HEADER_BYTES as u32 }) {
            Ok(bytes) => copies.push(bytes.expect("a read brings data").to_vec()),
            Err(problem) => failed = Some(problem),
        }
    }
    if copies.is_empty() {
        return Err(failed.expect("three reads were tried"));
    }
    let header = DiskHeader::choose(&copies)
        .map_err(|problem| DiskProblem::Format { path: path(), problem })?;
    if disk.size_bytes() < header.size {
        return Err(DiskProblem::Truncated {
            path: path(),
            found: disk.size_bytes(),
            expected: header.size,
        });
    }
    Ok(header)
}

/// Open a disk whose last owner may have died a moment ago: the kernel keeps a killed process's ring,
/// and with it the lock, until the ring's last I/O is over.
pub(crate) fn open_after_owner(path: &Path) -> Result<DiskFile, DiskProblem> {
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match DiskFile::open(path) {
            Err(RuntimeError::DiskHeld { .. }) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_PAUSE);
            }
            other => return Ok(other?),
        }
    }
}

/// An open disk: its lanes are recovered and wait for their reactor.
pub struct OpenDisk {
    /// The file or device, locked.
    pub file: DiskFile,
    /// Its header.
    pub header: DiskHeader,
    /// What a completed write means now: the worse of header and detection, unless overridden.
    pub durability: Durability,
    /// The lanes.
    pub lanes: Vec<Mounted>,
}

/// Open a disk of this cluster and recover its lanes.
pub fn open(
    path: &Path,
    cluster_id: &Uuid,
    incarnation: u64,
    pool: &Pool,
) -> Result<OpenDisk, DiskProblem> {
    let file = open_after_owner(path)?;
    let header = read_header(&file, pool)?;
    if header.cluster_id != *cluster_id {
        return Err(DiskProblem::WrongCluster {
            path: path.to_owned(),
            found: hex(&header.cluster_id),
            expected: hex(cluster_id),
        });
    }
    let detected = durability(&file);
    let durability = match (header.durability_override, header.durability, detected) {
        (true, chosen, _) => chosen,
        (false, Durability::Plp, Durability::Plp) => Durability::Plp,
        (false, _, _) => Durability::Volatile,
    };
    let mut lanes = Vec::new();
    for (index, entry) in header.lanes.iter().enumerate() {
        let parameters = MountParameters {
            entry: entry.clone(),
            nonce: random_u64(),
            incarnation,
            durability,
            atomic_bytes: header.atomic_bytes.min(file.promise().atomic_bytes),
            merge_always: false,
            mutant: Mutant::None,
        };
        let mounted = mount(&file, parameters, pool).map_err(|fault| DiskProblem::Lane {
            path: path.to_owned(),
            lane: index,
            fault,
        })?;
        lanes.push(mounted);
    }
    Ok(OpenDisk { file, header, durability, lanes })
}

/// Recover one lane with blocking I/O.
fn mount(file: &DiskFile, parameters: MountParameters, pool: &Pool) -> Result<Mounted, Fault> {
    let mut machine = Mount::new(parameters, pool.clone())?;
    let mut results = Vec::new();
    loop {
        match machine.next(std::mem::take(&mut results)) {
            MountStep::Io(batch) => {
                results =
                    batch.iter().map(|op| blocking::execute(file, pool, op)).collect::<Vec<_>>();
            }
            MountStep::Mounted(mounted) => return Ok(*mounted),
            MountStep::Faulted(fault) => return Err(fault),
        }
    }
}

/// Sum of what recovery found on all lanes.
#[must_use]
pub fn total(reports: impl Iterator<Item = RecoveryReport>) -> RecoveryReport {
    reports.fold(RecoveryReport::default(), |sum, next| RecoveryReport {
        frames: sum.frames + next.frames,
        records: sum.records + next.records,
        verified_blocks: sum.verified_blocks + next.verified_blocks,
        restored_blocks: sum.restored_blocks + next.restored_blocks,
        placed_blocks: sum.placed_blocks + next.placed_blocks,
        poisoned_blocks: sum.poisoned_blocks + next.poisoned_blocks,
        damaged_blocks: sum.damaged_blocks + next.damaged_blocks,
    })
}

const _: () = assert!(HEADER_BYTES.is_multiple_of(BLOCK_BYTES));
