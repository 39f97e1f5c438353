//! Frames as the reactor would hand them over: the bytes of a message, cut where its header says.

use proto::Pool;
use proto::frame::{Frame, OutFrame};
use proto::wire::{HEADER_BYTES, Header};

/// What the other side receives for what was sent.
#[must_use]
pub fn frame_of(out: OutFrame, pool: &Pool) -> (Header, Frame) {
    let (bytes, rest) = out.head.split_at(HEADER_BYTES);
    let header = Header::parse(bytes).expect("our own header");
    let (meta, records) = rest.split_at(header.body.meta_bytes as usize);
    let mut payload = out.payload;
    if !records.is_empty() {
        payload.insert(0, pool.copy_of(records).freeze());
    }
    (header, Frame { header: bytes.into(), meta: meta.into(), payload })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::shard_id;
    use proto::Epoch;
    use proto::wire::{RangeData, Request, RequestOp};

    #[test]
    fn a_message_comes_out_as_it_went_in() {
        let pool = Pool::new(1 << 20);
        let data = proto::block::single(crate::content::fill(&pool, &[3, 4]));
        let request = Request {
            command_id: 5,
            shard: shard_id(1),
            epoch: Epoch(2),
            attach_epoch: 1,
            is_fua: false,
            op: RequestOp::Write(RangeData::compute(8192, data).expect("aligned")),
        };
        assert_eq!(crate::store::through_bytes(&request, &pool), request);
    }
}
