//! What a replica keeps in its lane beside data: configuration, promise, frozen watermark.

use crate::conf::ShardConf;
use proto::{Epoch, Seq};

const VERSION: u8 = 1;
const NOT_FROZEN: u64 = u64::MAX;
const HEAD_BYTES: usize = 1 + 8 + 8;

/// The blob of the lane's CONF record.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stored {
    /// Nothing below this epoch is followed.
    pub promised: Epoch,
    /// complete_lsn of a replica that has left the ISR: its watermark at that moment, because what
    /// it learns of commits afterwards says nothing about its own content. `None` in the ISR, where
    /// the lane's watermark is it.
    pub frozen: Option<Seq>,
    /// The configuration that it follows.
    pub conf: Option<ShardConf>,
}

impl Stored {
    /// Bytes for the lane.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.extend_from_slice(&self.promised.0.to_le_bytes());
        out.extend_from_slice(&self.frozen.map_or(NOT_FROZEN, |seq| seq.0).to_le_bytes());
        if let Some(conf) = &self.conf {
            out.extend_from_slice(&conf.encode());
        }
        out
    }

    /// What the lane holds; an empty blob is a replica that is new. The lane has verified the bytes,
    /// so an error means another program or our own bug.
    pub fn decode(bytes: &[u8]) -> Result<Stored, String> {
        if bytes.is_empty() {
            return Ok(Stored::default());
        }
        if bytes.len() < HEAD_BYTES || bytes[0] != VERSION {
            return Err(format!(
                "a replica's record of {} bytes is not of this version",
                bytes.len()
            ));
        }
        let number = |at: usize| {
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("the length was checked"))
        };
        let conf = match &bytes[HEAD_BYTES..] {
            [] => None,
            rest => Some(ShardConf::decode(rest).map_err(|problem| problem.to_string())?),
        };
        let frozen = Some(number(9)).filter(|&seq| seq != NOT_FROZEN).map(Seq);
        Ok(Stored { promised: Epoch(number(1)), frozen, conf })
    }
}
