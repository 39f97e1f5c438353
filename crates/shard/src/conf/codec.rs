//! The bytes of a configuration, as lanes keep them and NEED_CONF carries them.
//!
//! Little-endian, in this order: version u8, rf u8, min_write u8, primary u8, the counts of `isr`,
//! `learners` and `members` u8 each, zero u8, volume u64, index u32, epoch u64, history_id u64,
//! attach_epoch u64; the copies of `isr`, then of `learners`, u8 each; per member copy u8, store
//! u64, incarnation u64, disk and format_uuid 16 bytes each; CRC32C of everything before it, u32.
//!
//! Decoding is strict: bytes that pass are a configuration which `check` accepts and which encodes
//! to the same bytes again, so nobody behind this edge validates a configuration a second time.

use super::{CopyId, Incarnation, MEMBERS_MAX, Member, ShardConf, StoreId};
use proto::checksum::crc32c;
use proto::wire::ID_LIMIT;
use proto::{Epoch, ShardId, VolumeId};

/// Version of this format.
pub const VERSION: u8 = 1;
/// A configuration never takes more: what a lane reserves for one.
pub const ENCODED_BYTES_MAX: usize = 1000;

const HEAD_BYTES: usize = 44;
const MEMBER_BYTES: usize = 49;
const CRC_BYTES: usize = 4;
const _: () = assert!(
    HEAD_BYTES + 2 * MEMBERS_MAX + MEMBERS_MAX * MEMBER_BYTES + CRC_BYTES <= ENCODED_BYTES_MAX
);

/// Why bytes are no configuration, or a configuration makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConfError {
    /// Not the length that its counts ask for.
    #[error("a configuration of {found} bytes where its counts ask for {expected}")]
    Length {
        /// By the counts.
        expected: usize,
        /// That came.
        found: usize,
    },
    /// Made by another version of the software.
    #[error("a configuration of format {0}, this software reads format 1")]
    Version(u8),
    /// Damaged.
    #[error("a damaged configuration: CRC32C {found:08x} where its bytes have {expected:08x}")]
    Checksum {
        /// Of the bytes.
        expected: u32,
        /// Stored behind them.
        found: u32,
    },
    /// A byte that must be zero.
    #[error("a reserved byte of a configuration holds {0}")]
    Reserved(u8),
    /// More than the limit.
    #[error("a configuration with {found} {list}, at most {MEMBERS_MAX} are possible")]
    TooMany {
        /// Which list.
        list: &'static str,
        /// Its length.
        found: usize,
    },
    /// A number that JSON would not carry exactly.
    #[error("{field} is {value}, which is not below 2^53")]
    TooLarge {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A number that names nothing.
    #[error("{0} is 0, which names nothing")]
    Zero(&'static str),
    /// Not strictly ascending, so a number may be there twice.
    #[error("{0} is not strictly ascending")]
    Unordered(&'static str),
    /// Two replicas of a shard on one store would die together.
    #[error("two members are on store {0}")]
    StoreTwice(StoreId),
    /// A list names a replica that does not exist.
    #[error("{list} names copy {copy}, which is not a member")]
    NotAMember {
        /// Which list.
        list: &'static str,
        /// Whom it names.
        copy: CopyId,
    },
    /// Nobody would have the acknowledged writes.
    #[error("the ISR is empty")]
    NoIsr,
    /// Nobody could serve.
    #[error("the primary, copy {0}, is not in the ISR")]
    PrimaryOutside(CopyId),
    /// A learner lacks writes, an ISR member has them all.
    #[error("copy {0} is both in the ISR and a learner")]
    LearnerInIsr(CopyId),
    /// Not between 1 and the limit.
    #[error("rf is {0}, it must be between 1 and {MEMBERS_MAX}")]
    Rf(u8),
    /// Not between 1 and `rf`.
    #[error("min_write is {min_write}, it must be between 1 and rf, which is {rf}")]
    MinWrite {
        /// That came.
        min_write: u8,
        /// That limits it.
        rf: u8,
    },
}

impl ShardConf {
    /// Say whether this can be a configuration at all; `transition` says whether it may follow one.
    pub fn check(&self) -> Result<(), ConfError> {
        self.check_numbers()?;
        self.check_members()?;
        self.check_list("isr", &self.isr)?;
        self.check_list("learners", &self.learners)?;
        if self.isr.is_empty() {
            return Err(ConfError::NoIsr);
        }
        if !self.isr.contains(&self.primary) {
            return Err(ConfError::PrimaryOutside(self.primary));
        }
        match self.learners.iter().find(|copy| self.isr.contains(copy)) {
            Some(copy) => Err(ConfError::LearnerInIsr(*copy)),
            None => Ok(()),
        }
    }

    /// The bytes; the configuration must be a sound one.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.check().expect("only sound configurations are made, and so encoded");
        let count = |length: usize| u8::try_from(length).expect("checked: at most MEMBERS_MAX");
        let mut out = Vec::with_capacity(ENCODED_BYTES_MAX);
        out.extend([VERSION, self.rf, self.min_write, self.primary]);
        out.extend([count(self.isr.len()), count(self.learners.len())]);
        out.extend([count(self.members.len()), 0]);
        out.extend(self.shard.volume.0.to_le_bytes());
        out.extend(self.shard.index.to_le_bytes());
        for number in [self.epoch.0, self.history_id, self.attach_epoch] {
            out.extend(number.to_le_bytes());
        }
        out.extend(&self.isr);
        out.extend(&self.learners);
        for member in &self.members {
            out.push(member.copy);
            out.extend(member.store.to_le_bytes());
            out.extend(member.incarnation.to_le_bytes());
            out.extend(member.disk);
            out.extend(member.format_uuid);
        }
        out.extend(crc32c(&out).to_le_bytes());
        assert!(out.len() <= ENCODED_BYTES_MAX, "the constants above bound it");
        out
    }

    /// Read the bytes of one configuration; nothing may follow them.
    pub fn decode(bytes: &[u8]) -> Result<ShardConf, ConfError> {
        let found = bytes.len();
        let least = HEAD_BYTES + CRC_BYTES;
        if found < least {
            return Err(ConfError::Length { expected: least, found });
        }
        if bytes[0] != VERSION {
            return Err(ConfError::Version(bytes[0]));
        }
        let counts = [bytes[4], bytes[5], bytes[6]].map(usize::from);
        for (list, count) in ["isr", "learners", "members"].into_iter().zip(counts) {
            if count > MEMBERS_MAX {
                return Err(ConfError::TooMany { list, found: count });
            }
        }
        let [isr, learners, members] = counts;
        let expected = least + isr + learners + members * MEMBER_BYTES;
        if found != expected {
            return Err(ConfError::Length { expected, found });
        }
        let (body, crc) = bytes.split_at(found - CRC_BYTES);
        let (expected, mut crc) = (crc32c(body), Reader(crc));
        let found = u32::from_le_bytes(crc.take());
        if found != expected {
            return Err(ConfError::Checksum { expected, found });
        }
        let conf = ShardConf::parse(body, counts)?;
        conf.check()?;
        Ok(conf)
    }

    /// The fields of bytes whose length and CRC are right.
    fn parse(body: &[u8], [isr, learners, members]: [usize; 3]) -> Result<ShardConf, ConfError> {
        let mut reader = Reader(body);
        let [_, rf, min_write, primary, _, _, _, reserved] = reader.take();
        if reserved != 0 {
            return Err(ConfError::Reserved(reserved));
        }
        let shard = ShardId { volume: VolumeId(reader.u64()), index: reader.u32() };
        let (epoch, history_id, attach_epoch) = (Epoch(reader.u64()), reader.u64(), reader.u64());
        Ok(ShardConf {
            shard,
            epoch,
            rf,
            min_write,
            primary,
            isr: reader.bytes(isr).to_vec(),
            learners: reader.bytes(learners).to_vec(),
            members: (0..members).map(|_| reader.member()).collect(),
            history_id,
            attach_epoch,
        })
    }

    fn check_numbers(&self) -> Result<(), ConfError> {
        let numbers = [
            ("volume_id", self.shard.volume.0),
            ("epoch", self.epoch.0),
            ("history_id", self.history_id),
            ("attach_epoch", self.attach_epoch),
        ];
        for (field, value) in numbers {
            check_below_limit(field, value)?;
        }
        if self.epoch.0 == 0 {
            return Err(ConfError::Zero("epoch"));
        }
        if self.rf == 0 || usize::from(self.rf) > MEMBERS_MAX {
            return Err(ConfError::Rf(self.rf));
        }
        if self.min_write == 0 || self.min_write > self.rf {
            return Err(ConfError::MinWrite { min_write: self.min_write, rf: self.rf });
        }
        Ok(())
    }

    fn check_members(&self) -> Result<(), ConfError> {
        if self.members.len() > MEMBERS_MAX {
            return Err(ConfError::TooMany { list: "members", found: self.members.len() });
        }
        if !self.members.is_sorted_by(|one, next| one.copy < next.copy) {
            return Err(ConfError::Unordered("members"));
        }
        for (place, member) in self.members.iter().enumerate() {
            for (field, value) in [("store", member.store), ("incarnation", member.incarnation)] {
                check_below_limit(field, value)?;
                if value == 0 {
                    return Err(ConfError::Zero(field));
                }
            }
            if self.members[..place].iter().any(|other| other.store == member.store) {
                return Err(ConfError::StoreTwice(member.store));
            }
        }
        Ok(())
    }

    fn check_list(&self, list: &'static str, copies: &[CopyId]) -> Result<(), ConfError> {
        if !copies.is_sorted_by(|one, next| one < next) {
            return Err(ConfError::Unordered(list));
        }
        match copies.iter().find(|copy| self.member(**copy).is_none()) {
            Some(copy) => Err(ConfError::NotAMember { list, copy: *copy }),
            None => Ok(()),
        }
    }
}

fn check_below_limit(field: &'static str, value: u64) -> Result<(), ConfError> {
    if value < ID_LIMIT { Ok(()) } else { Err(ConfError::TooLarge { field, value }) }
}

/// Bytes whose number was checked before.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(count);
        self.0 = rest;
        head
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().expect("as many bytes as were asked for")
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn member(&mut self) -> Member {
        let [copy] = self.take();
        let (store, incarnation): (StoreId, Incarnation) = (self.u64(), self.u64());
        Member { copy, store, incarnation, disk: self.take(), format_uuid: self.take() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conf::tests::{member, three};
    use proptest::prelude::*;

    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let body = bytes.len() - CRC_BYTES;
        let crc = crc32c(&bytes[..body]).to_le_bytes();
        bytes[body..].copy_from_slice(&crc);
        bytes
    }

    #[test]
    fn the_format_is_frozen() {
        let conf = ShardConf {
            shard: ShardId { volume: VolumeId(0x0102_0304), index: 5 },
            epoch: Epoch(6),
            rf: 3,
            min_write: 2,
            primary: 1,
            isr: vec![1],
            learners: vec![2],
            members: vec![member(1, 9), member(2, 10)],
            history_id: 7,
            attach_epoch: 8,
        };
        let bytes = conf.encode();
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = concat!(
            "0103020101010200",
            "0403020100000000",
            "05000000",
            "0600000000000000",
            "0700000000000000",
            "0800000000000000",
            "01",
            "02",
            "01",
            "0900000000000000",
            "5b00000000000000",
            "09090909090909090909090909090909",
            "0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a",
            "02",
            "0a00000000000000",
            "6500000000000000",
            "0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a",
            "0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b",
        );
        assert_eq!(text[..text.len() - 8], *expected);
        assert_eq!(ShardConf::decode(&bytes), Ok(conf));
    }

    #[test]
    fn the_largest_fits() {
        let mut conf = three();
        conf.members = (0..8).map(|copy| member(copy, u64::from(copy) + 1)).collect();
        conf.isr = (0..8).collect();
        assert_eq!(conf.check(), Ok(()));
        assert!(conf.encode().len() <= ENCODED_BYTES_MAX);
        conf.members.push(member(8, 9));
        assert_eq!(conf.check(), Err(ConfError::TooMany { list: "members", found: 9 }));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = three().encode();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(ShardConf::decode(&damaged).is_err(), "bit {bit}");
        }
        assert!(ShardConf::decode(&bytes[..bytes.len() - 1]).is_err());
        assert!(ShardConf::decode(&[bytes, vec![0]].concat()).is_err());
    }

    #[test]
    fn head_errors_are_named_although_the_crc_is_right() {
        let bytes = three().encode();
        let with = |at: usize, value: u8| {
            let mut changed = bytes.clone();
            changed[at] = value;
            ShardConf::decode(&sealed(changed))
        };
        assert_eq!(with(0, 2), Err(ConfError::Version(2)));
        assert_eq!(with(7, 1), Err(ConfError::Reserved(1)));
        assert_eq!(with(6, 9), Err(ConfError::TooMany { list: "members", found: 9 }));
        assert_eq!(with(5, 200), Err(ConfError::TooMany { list: "learners", found: 200 }));
        let expected = bytes.len() + 1;
        assert_eq!(with(5, 1), Err(ConfError::Length { expected, found: bytes.len() }));
        assert_eq!(ShardConf::decode(&[]), Err(ConfError::Length { expected: 48, found: 0 }));
    }

    #[test]
    fn each_rule_of_a_configuration_has_its_error() {
        type Change = fn(&mut ShardConf);
        let table: [(Change, ConfError); 18] = [
            (|c| c.members.swap(0, 1), ConfError::Unordered("members")),
            (|c| c.members[1].copy = 0, ConfError::Unordered("members")),
            (|c| c.members[2].store = 1, ConfError::StoreTwice(1)),
            (|c| c.members[2].store = 0, ConfError::Zero("store")),
            (|c| c.members[0].incarnation = 0, ConfError::Zero("incarnation")),
            (
                |c| c.members[0].incarnation = 1 << 53,
                ConfError::TooLarge { field: "incarnation", value: 1 << 53 },
            ),
            (|c| c.isr = vec![1, 0], ConfError::Unordered("isr")),
            (|c| c.isr = vec![0, 0], ConfError::Unordered("isr")),
            (|c| c.isr = vec![0, 7], ConfError::NotAMember { list: "isr", copy: 7 }),
            (|c| c.learners = vec![7], ConfError::NotAMember { list: "learners", copy: 7 }),
            (|c| c.isr.clear(), ConfError::NoIsr),
            (|c| c.isr = vec![1, 2], ConfError::PrimaryOutside(0)),
            (|c| c.learners = vec![2], ConfError::LearnerInIsr(2)),
            (|c| c.rf = 0, ConfError::Rf(0)),
            (|c| c.rf = 9, ConfError::Rf(9)),
            (|c| c.min_write = 0, ConfError::MinWrite { min_write: 0, rf: 3 }),
            (|c| c.min_write = 4, ConfError::MinWrite { min_write: 4, rf: 3 }),
            (|c| c.epoch = Epoch(0), ConfError::Zero("epoch")),
        ];
        assert_eq!(three().check(), Ok(()));
        for (change, expected) in table {
            let mut conf = three();
            change(&mut conf);
            assert_eq!(conf.check(), Err(expected), "{conf:?}");
        }
    }

    proptest! {
        #[test]
        fn sound_configurations_survive_the_round_trip(conf in crate::conf::tests::any_conf()) {
            let bytes = conf.encode();
            prop_assert!(bytes.len() <= ENCODED_BYTES_MAX);
            prop_assert_eq!(ShardConf::decode(&bytes), Ok(conf));
        }

        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..1200)) {
            prop_assert!(ShardConf::decode(&bytes).is_err());
        }

        /// Random fields behind a right version, right counts and a right CRC reach every check.
        #[test]
        fn what_decodes_encodes_to_the_same_bytes(
            counts in (0..=9u8, 0..=9u8, 0..=9u8),
            fill in proptest::collection::vec(0..4u8, 600),
            zero_high in any::<bool>(),
        ) {
            let (isr, learners, members) = counts;
            let length = HEAD_BYTES + usize::from(isr) + usize::from(learners)
                + usize::from(members) * MEMBER_BYTES + CRC_BYTES;
            let mut bytes = fill[..length].to_vec();
            bytes[0] = VERSION;
            bytes[4..8].copy_from_slice(&[isr, learners, members, fill[7] / 3]);
            if zero_high {
                for at in (8..44).filter(|at| ![8, 16, 20, 28, 36].contains(at)) {
                    bytes[at] = 0;
                }
            }
            let bytes = sealed(bytes);
            if let Ok(conf) = ShardConf::decode(&bytes) {
                prop_assert_eq!(conf.encode(), bytes);
            }
        }
    }
}
