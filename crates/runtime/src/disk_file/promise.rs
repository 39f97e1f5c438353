//! What a disk promises on power loss, read from sysfs.
//!
//! Three questions, each answered by the worst of all devices below the file: does the device lose
//! what it acknowledged (a volatile write cache), how many bytes does it write all or nothing, and
//! where does the partition start. Rules (docs/internals/lane.md, write modes): whatever is unknown
//! counts as volatile; so does a file on anything else than ext4 and xfs, because only for those we
//! know that overwriting a written block moves no metadata. sysfs is a parameter, so that the tests
//! can show machines that we do not have.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

const EXT4_MAGIC: u64 = 0xEF53;
const XFS_MAGIC: u64 = 0x5846_5342;
/// dm on md on dm on partitions: deeper stacks than this are a loop.
const STACK_MAX: u32 = 8;
const SECTOR_BYTES: u32 = 512;

/// Is an acknowledged write safe from power loss without a flush?
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Durability {
    /// No: only what was flushed.
    Volatile,
    /// Yes: no volatile cache, or one protected against power loss.
    PowerLossProtected,
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Durability::Volatile => "volatile",
            Durability::PowerLossProtected => "plp",
        })
    }
}

/// What was found out, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Promise {
    /// The class.
    pub durability: Durability,
    /// Which finding decided, for `pf disk list` and the disk header.
    pub reason: String,
    /// Aligned writes up to this many bytes are all or nothing on power loss; at least a sector.
    pub atomic_bytes: u32,
}

/// The file system of a regular file.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileSystem {
    pub magic: u64,
    pub block_bytes: u32,
}

type DeviceNumber = (u32, u32);

/// A view of `/sys`, or of a test's imitation.
pub(super) struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    pub fn real() -> Sysfs {
        Sysfs::at(Path::new("/sys"))
    }

    pub fn at(root: &Path) -> Sysfs {
        Sysfs { root: root.to_owned() }
    }

    /// Where the device starts on its disk, in bytes; 0 if it is no partition or unknown.
    pub fn partition_start_bytes(&self, device: DeviceNumber) -> u64 {
        let start = self.folder(device).and_then(|folder| read(&folder, "start"));
        // sysfs counts in 512-byte units whatever the sector size is.
        start.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0).saturating_mul(512)
    }

    /// Everything known about `device`, and about the file system on it if there is one.
    pub fn promise(&self, device: DeviceNumber, file_system: Option<FileSystem>) -> Promise {
        if let Some(system) = &file_system
            && ![EXT4_MAGIC, XFS_MAGIC].contains(&system.magic)
        {
            return Promise::unknown(format!(
                "file system with magic {:#x} is neither ext4 nor xfs",
                system.magic
            ));
        }
        let Some(folder) = self.folder(device) else {
            return Promise::unknown(format!(
                "no sysfs entry for device {}:{}",
                device.0, device.1
            ));
        };
        let mut promise = promise_of(&folder, 0);
        if let Some(system) = file_system {
            // A file's blocks are contiguous and aligned on the device up to this size only.
            let aligned = self.partition_start_bytes(device).is_multiple_of(4096);
            let limit = if aligned { system.block_bytes } else { SECTOR_BYTES };
            promise.atomic_bytes = promise.atomic_bytes.min(limit).max(SECTOR_BYTES);
        }
        promise
    }

    fn folder(&self, (major, minor): DeviceNumber) -> Option<PathBuf> {
        // Resolved, because the parent of a partition's folder is its disk.
        fs::canonicalize(self.root.join(format!("dev/block/{major}:{minor}"))).ok()
    }
}

impl Promise {
    fn unknown(reason: String) -> Promise {
        Promise { durability: Durability::Volatile, reason, atomic_bytes: SECTOR_BYTES }
    }

    fn worse(self, other: Promise) -> Promise {
        let atomic_bytes = self.atomic_bytes.min(other.atomic_bytes);
        let worst = if other.durability < self.durability { other } else { self };
        Promise { atomic_bytes, ..worst }
    }
}

/// The promise of the device whose sysfs folder this is, its members included.
fn promise_of(folder: &Path, depth: u32) -> Promise {
    let name = name_of(folder);
    if depth > STACK_MAX {
        return Promise::unknown(format!("{name}: more than {STACK_MAX} devices stacked"));
    }
    if folder.join("partition").exists() {
        let Some(disk) = folder.parent() else {
            return Promise::unknown(format!("{name}: partition of nothing"));
        };
        return promise_of(disk, depth + 1);
    }
    if folder.join("loop").exists() {
        return Promise::unknown(format!("{name}: loop device, its file is cached by the host"));
    }
    let own = own_promise(folder, &name);
    let members = fs::read_dir(folder.join("slaves")).into_iter().flatten().flatten();
    members.fold(own, |worst, member| match fs::canonicalize(member.path()) {
        Ok(below) => worst.worse(promise_of(&below, depth + 1)),
        Err(_) => Promise::unknown(format!("{name}: a member cannot be looked at")),
    })
}

fn own_promise(folder: &Path, name: &str) -> Promise {
    let cache = read(folder, "queue/write_cache");
    let (durability, reason) = match cache.as_deref() {
        Some("write through") => {
            (Durability::PowerLossProtected, format!("{name}: write_cache is 'write through'"))
        }
        Some(other) => (Durability::Volatile, format!("{name}: write_cache is '{other}'")),
        None => (Durability::Volatile, format!("{name}: sysfs shows no write_cache")),
    };
    Promise { durability, reason, atomic_bytes: atomic_bytes(folder, name) }
}

/// The device's all-or-nothing unit.
///
/// `atomic_write_unit_max_bytes` (Linux 6.11) says it outright. Before, for NVMe alone, the
/// physical block size does: the driver bounds it by the power-fail unit (AWUPF, NAWUPF). The
/// physical block size of other drives says what is *fast*: a 512e disk may tear its 4 KiB.
fn atomic_bytes(folder: &Path, name: &str) -> u32 {
    let number = |file: &str| {
        read(folder, file).and_then(|text| text.parse::<u32>().ok()).filter(|&bytes| bytes > 0)
    };
    let stated = number("queue/atomic_write_unit_max_bytes");
    let physical = || number("queue/physical_block_size").filter(|_| name.starts_with("nvme"));
    stated.or_else(physical).or_else(|| number("queue/logical_block_size")).unwrap_or(SECTOR_BYTES)
}

fn name_of(folder: &Path) -> String {
    folder.file_name().map_or_else(|| "?".to_owned(), |name| name.to_string_lossy().into_owned())
}

fn read(folder: &Path, file: &str) -> Option<String> {
    fs::read_to_string(folder.join(file)).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk_file::tests::Folder;
    use std::os::unix::fs::symlink;

    const EXT4: Option<FileSystem> = Some(FileSystem { magic: EXT4_MAGIC, block_bytes: 4096 });

    /// An imitation of /sys: devices, files in their folders, members.
    struct Machine(Folder);

    impl Machine {
        fn new() -> Machine {
            let folder = Folder::new();
            fs::create_dir_all(folder.path("dev/block")).expect("folder");
            Machine(folder)
        }

        fn device(&self, number: &str, place: &str, files: &[(&str, &str)]) -> &Machine {
            let folder = self.0.path(&format!("devices/{place}"));
            fs::create_dir_all(folder.join("queue")).expect("folder");
            for (file, text) in files {
                fs::write(folder.join(file), format!("{text}\n")).expect("file");
            }
            symlink(&folder, self.0.path(&format!("dev/block/{number}"))).expect("link");
            self
        }

        fn member(&self, upper: &str, lower: &str) -> &Machine {
            let slaves = self.0.path(&format!("devices/{upper}/slaves"));
            fs::create_dir_all(&slaves).expect("folder");
            let name = Path::new(lower).file_name().expect("a name");
            symlink(self.0.path(&format!("devices/{lower}")), slaves.join(name)).expect("link");
            self
        }

        fn promise(&self, device: DeviceNumber, on: Option<FileSystem>) -> Promise {
            Sysfs::at(&self.0.path("")).promise(device, on)
        }
    }

    const THROUGH: (&str, &str) = ("queue/write_cache", "write through");
    const BACK: (&str, &str) = ("queue/write_cache", "write back");

    #[test]
    fn a_drive_without_volatile_cache_protects() {
        let machine = Machine::new();
        let physical = ("queue/physical_block_size", "16384");
        machine.device("259:0", "nvme0n1", &[THROUGH, physical]);
        machine.device("259:1", "nvme0n1/nvme0n1p1", &[("partition", "1"), ("start", "2048")]);
        let whole = machine.promise((259, 0), None);
        assert_eq!(whole.durability, Durability::PowerLossProtected);
        assert_eq!(whole.reason, "nvme0n1: write_cache is 'write through'");
        assert_eq!(whole.atomic_bytes, 16384);
        let part = machine.promise((259, 1), EXT4);
        assert_eq!(part.durability, Durability::PowerLossProtected);
        assert_eq!(part.atomic_bytes, 4096, "files are contiguous in file system blocks only");
    }

    #[test]
    fn the_worst_member_decides() {
        let machine = Machine::new();
        let big = ("queue/atomic_write_unit_max_bytes", "65536");
        machine.device("259:0", "nvme0n1", &[THROUGH, big]);
        machine.device("8:0", "sda", &[BACK, ("queue/physical_block_size", "4096")]);
        machine.device("253:0", "dm-0", &[THROUGH, big]);
        machine.member("dm-0", "nvme0n1");
        assert_eq!(machine.promise((253, 0), None).durability, Durability::PowerLossProtected);
        assert_eq!(machine.promise((253, 0), None).atomic_bytes, 65536);
        machine.member("dm-0", "sda");
        let promise = machine.promise((253, 0), None);
        assert_eq!(promise.durability, Durability::Volatile);
        assert_eq!(promise.reason, "sda: write_cache is 'write back'");
        assert_eq!(promise.atomic_bytes, 512, "a physical block says nothing about tearing");
    }

    #[test]
    fn whatever_is_unknown_is_volatile() {
        let machine = Machine::new();
        machine.device("252:0", "vda", &[]);
        machine.device("7:0", "loop0", &[THROUGH, ("loop", "")]);
        machine.device("259:0", "nvme0n1", &[THROUGH]);
        let btrfs = Some(FileSystem { magic: 0x9123_683E, block_bytes: 4096 });
        let cases = [
            ((1, 1), EXT4, "no sysfs entry for device 1:1"),
            ((252, 0), None, "vda: sysfs shows no write_cache"),
            ((7, 0), None, "loop0: loop device"),
            ((259, 0), btrfs, "neither ext4 nor xfs"),
        ];
        for (device, file_system, reason) in cases {
            let promise = machine.promise(device, file_system);
            assert_eq!(promise.durability, Durability::Volatile, "{reason}");
            assert!(promise.reason.contains(reason), "{} / {reason}", promise.reason);
            assert_eq!(promise.atomic_bytes, 512);
        }
    }

    #[test]
    fn a_ring_of_devices_ends() {
        let machine = Machine::new();
        machine.device("253:0", "dm-0", &[THROUGH]).device("253:1", "dm-1", &[THROUGH]);
        machine.member("dm-0", "dm-1").member("dm-1", "dm-0");
        let promise = machine.promise((253, 0), None);
        assert_eq!(promise.durability, Durability::Volatile);
        assert!(promise.reason.contains("stacked"), "{}", promise.reason);
    }

    #[test]
    fn an_odd_partition_start_rules_out_atomic_blocks() {
        let machine = Machine::new();
        machine.device("259:0", "nvme0n1", &[THROUGH, ("queue/physical_block_size", "4096")]);
        machine.device("259:1", "nvme0n1/nvme0n1p1", &[("partition", "1"), ("start", "63")]);
        assert_eq!(Sysfs::at(&machine.0.path("")).partition_start_bytes((259, 1)), 63 * 512);
        assert_eq!(machine.promise((259, 1), EXT4).atomic_bytes, 512);
    }
}
