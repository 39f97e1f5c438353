//! One exchange with a client: what its request on the wire asks of a shard, and how the shard's
//! answer goes back.
//!
//! # Theory of operation
//!
//! Who receives a request calls [`turn`]. It checks the request against the connection's ticket and
//! says what to do: answer or refuse it at once, fence a slot, or ask the shard. Then the
//! [`Exchange`] is kept, under the token of the question, until the shard has answered, and
//! [`Exchange::finish`] makes the reply and what is to be told to `paths`. Sockets, tokens and
//! limits are the owner's: the store node and the simulator do the same from here on.

use crate::client::{Answer, ClientOp, ClientRequest};
use proto::wire::{
    ByteRange, CheckedData, Header, Reply, ReplyOp, Request, RequestOp, Rights, Ticket,
};
use proto::{BLOCK_BYTES, Epoch, Lsn, Seq, Status};

/// What a client's request comes to.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "the large one is the common one: no box per I/O")]
pub enum Turn {
    /// Answer it at once.
    Reply(ReplyOp),
    /// Refuse it at once.
    Refuse(Status),
    /// Fence a slot of its session; answered when `paths` says so.
    Fence {
        /// Which slot.
        slot: u8,
        /// Up to which opening of it.
        generation: u64,
    },
    /// Ask its shard; the exchange goes on with the answer.
    Ask(Exchange, ClientRequest),
}

/// A request that a shard works on.
#[derive(Debug)]
pub struct Exchange {
    header: Header,
    bytes: u64,
    /// The reply to a success without data; `None` for a read.
    done: Option<ReplyOp>,
    start_in_block: u32,
}

/// An exchange that is over.
#[derive(Debug)]
pub struct Finished {
    /// Of its last operation, if it needed one.
    pub lsn: Option<Lsn>,
    /// What became of it.
    pub status: Status,
    /// For the client.
    pub reply: Reply,
}

/// Decide what a request of a client, whose connection holds `ticket`, comes to. `token` names the
/// question to the shard.
#[must_use]
pub fn turn(token: u64, header: Header, request: Request, ticket: &Ticket) -> Turn {
    let zero = |range: ByteRange| ClientOp::Zero { offset: range.offset(), length: range.length() };
    let (op, done) = match request.op {
        RequestOp::Ping(ping) => return Turn::Reply(ReplyOp::Ping(ping)),
        RequestOp::FencePath { slot, generation } => return Turn::Fence { slot, generation },
        RequestOp::Read { range, snap_seq: None } => {
            (ClientOp::Read { offset: range.offset(), length: range.length() }, None)
        }
        RequestOp::Write(data) => {
            let (range, crcs, data) = data.into_parts();
            (ClientOp::Write { offset: range.offset(), crcs, data }, Some(ReplyOp::Write))
        }
        RequestOp::Discard(range) => (zero(range), Some(ReplyOp::Discard)),
        RequestOp::WriteZeroes { range, .. } => (zero(range), Some(ReplyOp::WriteZeroes)),
        RequestOp::Flush => (ClientOp::Flush, Some(ReplyOp::Flush)),
        RequestOp::Read { snap_seq: Some(_), .. }
        | RequestOp::CompareAndWrite { .. }
        | RequestOp::Hello(_)
        | RequestOp::Prepare(_)
        | RequestOp::Settle(_)
        | RequestOp::Tails(_)
        | RequestOp::Copy(_)
        | RequestOp::Digest(_)
        | RequestOp::Snap(_)
        | RequestOp::Attach(..)
        | RequestOp::NeedConf(_) => return Turn::Refuse(Status::Unsupported),
    };
    // What the header says of attaching must be what the conductor has signed.
    if ticket.volume != header.shard.volume || request.attach_epoch > ticket.attach_epoch {
        return Turn::Refuse(Status::Denied);
    }
    if op.is_change() && ticket.rights != Rights::READ_WRITE {
        return Turn::Refuse(Status::ReadOnly);
    }
    let (start_in_block, bytes) = match &op {
        ClientOp::Read { offset, length } => {
            ((*offset % BLOCK_BYTES as u64) as u32, u64::from(*length))
        }
        ClientOp::Write { data, .. } => (0, data.iter().map(|buf| buf.len() as u64).sum()),
        ClientOp::Zero { .. } | ClientOp::Flush => (0, 0),
    };
    let (epoch, attach_epoch) = (request.epoch, request.attach_epoch);
    let exchange = Exchange { header, bytes, done, start_in_block };
    Turn::Ask(exchange, ClientRequest { token, epoch, attach_epoch, op })
}

impl Exchange {
    /// The header of the request.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of data that it holds or will bring: what limits of a connection count.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The shard has answered. `epoch` is that of its configuration now; `reign` that of the
    /// operations it has ordered (`Replica::reign_epoch`), which may be older.
    #[must_use]
    pub fn finish(self, result: Result<Answer, Status>, epoch: Epoch, reign: Epoch) -> Finished {
        let (seq, result) = match result {
            Ok(Answer::Done(seq)) => (seq, Ok(self.done.expect("only a read brings data"))),
            Ok(Answer::Read { crcs, data }) => {
                let data = CheckedData::assume(self.start_in_block, crcs, data);
                (Seq(0), Ok(ReplyOp::Read(data)))
            }
            Err(status) => (Seq(0), Err(status)),
        };
        let status = result.as_ref().map_or_else(|status| *status, |_| Status::Ok);
        // A change that needed no operation has no lsn.
        let lsn = (seq > Seq(0)).then_some(Lsn { epoch: reign, seq });
        let reply = match result {
            Ok(op) => reply_to(&self.header, epoch, seq, op),
            Err(status) => Reply::refuse(&self.header, epoch, status, 0),
        };
        Finished { lsn, status, reply }
    }
}

/// A successful reply to a request.
#[must_use]
pub fn reply_to(header: &Header, epoch: Epoch, seq: Seq, op: ReplyOp) -> Reply {
    let (command_id, shard) = (header.command_id, header.shard);
    Reply { command_id, shard, epoch, seq, result: Ok(op) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::wire::HEADER_BYTES;
    use proto::{Pool, ShardId, VolumeId};
    use smallvec::SmallVec;

    const TICKET: Ticket = Ticket {
        volume: VolumeId(3),
        attach_epoch: 5,
        session: 1,
        expires: 0,
        rights: Rights::READ_WRITE,
    };

    fn ask(ticket: &Ticket, attach_epoch: u64, op: RequestOp) -> Turn {
        let shard = ShardId { volume: VolumeId(3), index: 2 };
        let request =
            Request { command_id: 9, shard, epoch: Epoch(4), attach_epoch, is_fua: false, op };
        let header = Header::parse(&request.encode().head[..HEADER_BYTES]).expect("our own");
        turn(77, header, request, ticket)
    }

    fn range() -> ByteRange {
        ByteRange::new(512, 1024).expect("sectors")
    }

    fn exchange(op: RequestOp) -> (Exchange, ClientRequest) {
        match ask(&TICKET, 5, op) {
            Turn::Ask(exchange, request) => (exchange, request),
            Turn::Reply(_) | Turn::Refuse(_) | Turn::Fence { .. } => panic!("the shard is asked"),
        }
    }

    #[test]
    fn a_read_carries_its_place_in_the_block_and_brings_data() {
        let (exchange, request) = exchange(RequestOp::Read { range: range(), snap_seq: None });
        assert_eq!((request.token, request.epoch, request.attach_epoch), (77, Epoch(4), 5));
        assert_eq!((exchange.start_in_block, exchange.bytes()), (512, 1024));
        let buf = Pool::new(1 << 20).copy_of(&[7; 1024]).freeze();
        let crcs = SmallVec::from_slice(&[proto::checksum::crc32c(&buf)]);
        let answer = Answer::Read { crcs, data: proto::block::single(buf) };
        let finished = exchange.finish(Ok(answer), Epoch(6), Epoch(4));
        assert_eq!((finished.lsn, finished.status), (None, Status::Ok));
        let Ok(ReplyOp::Read(_)) = finished.reply.result else { panic!("data") };
        assert_eq!((finished.reply.command_id, finished.reply.epoch), (9, Epoch(6)));
    }

    /// The client has asked in epoch 4 of the configuration; the operation was ordered in a reign
    /// that had begun in epoch 3, and meanwhile the configuration has epoch 6. Three numbers, and
    /// the outcome is named by its own.
    #[test]
    fn an_outcome_carries_the_epoch_of_its_lsn_and_not_of_the_request() {
        let (exchange, _) = exchange(RequestOp::Discard(range()));
        let finished = exchange.finish(Ok(Answer::Done(Seq(8))), Epoch(6), Epoch(3));
        assert_eq!(finished.lsn, Some(Lsn { epoch: Epoch(3), seq: Seq(8) }));
        assert_eq!((finished.reply.epoch, finished.reply.seq), (Epoch(6), Seq(8)));
    }

    #[test]
    fn what_needed_no_operation_and_what_failed_has_no_lsn() {
        let (flush, _) = exchange(RequestOp::Flush);
        let finished = flush.finish(Ok(Answer::Done(Seq(0))), Epoch(6), Epoch(3));
        assert_eq!((finished.lsn, finished.status), (None, Status::Ok));
        let (zero, _) = exchange(RequestOp::Discard(range()));
        let finished = zero.finish(Err(Status::NotPrimary), Epoch(6), Epoch(3));
        assert_eq!((finished.lsn, finished.status), (None, Status::NotPrimary));
        let failure = finished.reply.result.expect_err("refused");
        assert_eq!(failure.status, Status::NotPrimary);
    }

    #[test]
    fn a_ticket_allows_what_it_says() {
        let refused = |ticket: &Ticket, attach_epoch, op| match ask(ticket, attach_epoch, op) {
            Turn::Refuse(status) => Some(status),
            Turn::Reply(_) | Turn::Fence { .. } | Turn::Ask(..) => None,
        };
        let read = || RequestOp::Read { range: range(), snap_seq: None };
        let other = Ticket { volume: VolumeId(4), ..TICKET };
        let reader = Ticket { rights: Rights::READ, ..TICKET };
        assert_eq!(refused(&TICKET, 5, read()), None);
        assert_eq!(refused(&other, 5, read()), Some(Status::Denied));
        assert_eq!(refused(&TICKET, 6, read()), Some(Status::Denied));
        assert_eq!(refused(&reader, 5, read()), None);
        assert_eq!(refused(&reader, 5, RequestOp::Discard(range())), Some(Status::ReadOnly));
        let later = RequestOp::Read { range: range(), snap_seq: Some(1) };
        assert_eq!(refused(&TICKET, 5, later), Some(Status::Unsupported));
    }
}
