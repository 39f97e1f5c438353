//! What happened, as lines for people and for the executable specification, and as one hash.
//!
//! Everything that is told is hashed, whether lines are kept or not: two runs are the same run when
//! their hashes are equal (I28). A line is one JSON object with its keys in a fixed order.

use shard::conf::ShardConf;
use std::fmt::Write;
use xxhash_rust::xxh3::Xxh3;

/// The record of one world.
pub struct Trace {
    hash: Xxh3,
    lines: Option<String>,
    /// One line, while it is made.
    line: String,
}

impl Trace {
    /// Keep the lines, or only hash them.
    #[must_use]
    pub fn new(keeps_lines: bool) -> Trace {
        Trace { hash: Xxh3::new(), lines: keeps_lines.then(String::new), line: String::new() }
    }

    /// The hash of all that was told so far.
    #[must_use]
    pub fn hash(&self) -> u128 {
        self.hash.digest128()
    }

    /// The lines since the last call.
    pub fn take(&mut self) -> String {
        self.lines.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Something that has no line: an event of the world, as numbers.
    pub fn mark(&mut self, now: u64, what: u64, detail: u64) {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&now.to_le_bytes());
        bytes[8..16].copy_from_slice(&what.to_le_bytes());
        bytes[16..].copy_from_slice(&detail.to_le_bytes());
        self.hash.update(&bytes);
    }

    /// One line: kind, then keys with numbers.
    pub fn event(&mut self, now: u64, kind: &str, fields: &[(&str, u64)]) {
        self.begin(now, kind);
        for (name, value) in fields {
            self.number(name, *value);
        }
        self.end();
    }

    /// A change of role.
    pub fn role(&mut self, now: u64, (shard, store, inc): (u32, u64, u64), epoch: u64, role: &str) {
        self.begin(now, "role");
        self.number("shard", shard.into());
        self.number("store", store);
        self.number("inc", inc);
        self.number("epoch", epoch);
        self.text("role", role);
        self.end();
    }

    /// An operation has its lsn. `place`: shard, store, incarnation; `lsn`: epoch, seq; `range`:
    /// first block, count.
    pub fn assigned(
        &mut self,
        now: u64,
        place: (u32, u64, u64),
        lsn: (u64, u64),
        range: (u32, u32),
        (settle, heal): (bool, bool),
    ) {
        self.begin(now, "assigned");
        self.place_and_lsn(place, lsn);
        self.number("first", range.0.into());
        self.number("count", range.1.into());
        let _ = write!(self.line, ",\"settle\":{settle}");
        if heal {
            self.line.push_str(",\"heal\":true");
        }
        self.end();
    }

    /// An operation is committed.
    pub fn committed(&mut self, now: u64, place: (u32, u64, u64), lsn: (u64, u64), acked: &[u64]) {
        self.begin(now, "committed");
        self.place_and_lsn(place, lsn);
        self.numbers("acked", acked.iter().copied());
        self.end();
    }

    /// A configuration is stored.
    pub fn conf(&mut self, now: u64, conf: &ShardConf, transition: &str, by: u64) {
        self.begin(now, "conf");
        self.number("shard", conf.shard.index.into());
        let _ = write!(
            self.line,
            ",\"conf\":{{\"volume_id\":{},\"index\":{},\"epoch\":{},\"rf\":{},\"min_write\":{},\
             \"primary\":{}",
            conf.shard.volume.0,
            conf.shard.index,
            conf.epoch.0,
            conf.rf,
            conf.min_write,
            conf.primary
        );
        self.numbers("isr", conf.isr.iter().map(|&copy| copy.into()));
        self.numbers("learners", conf.learners.iter().map(|&copy| copy.into()));
        self.line.push_str(",\"members\":[");
        for (index, member) in conf.members.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(
                self.line,
                "{comma}{{\"copy\":{},\"store\":{},\"incarnation\":{},\"disk\":\"{:032x}\",\
                 \"format_uuid\":\"{:032x}\"}}",
                member.copy,
                member.store,
                member.incarnation,
                u128::from_be_bytes(member.disk),
                u128::from_be_bytes(member.format_uuid)
            );
        }
        let _ = write!(
            self.line,
            "],\"history_id\":{},\"attach_epoch\":{}}}",
            conf.history_id, conf.attach_epoch
        );
        self.text("transition", transition);
        self.number("by", by);
        self.end();
    }

    /// A client's request begins. `range`: first block of the volume, count.
    pub fn invoke(
        &mut self,
        now: u64,
        (client, id): (u64, u64),
        op: &str,
        range: (u64, u64),
        values: &[u64],
    ) {
        self.begin(now, "invoke");
        self.number("client", client);
        self.number("id", id);
        self.text("op", op);
        self.number("first", range.0);
        self.number("count", range.1);
        self.numbers("values", values.iter().copied());
        self.end();
    }

    /// A client's request is answered.
    pub fn reply(&mut self, now: u64, (client, id): (u64, u64), status: u64, values: &[u64]) {
        self.begin(now, "reply");
        self.number("client", client);
        self.number("id", id);
        self.number("status", status);
        self.numbers("values", values.iter().copied());
        self.end();
    }

    fn begin(&mut self, now: u64, kind: &str) {
        self.line.clear();
        // Writing to a String cannot fail.
        let _ = write!(self.line, "{{\"t\":{now},\"k\":\"{kind}\"");
    }

    fn place_and_lsn(&mut self, (shard, store, inc): (u32, u64, u64), (epoch, seq): (u64, u64)) {
        self.number("shard", shard.into());
        self.number("store", store);
        self.number("inc", inc);
        self.number("epoch", epoch);
        self.number("seq", seq);
    }

    fn number(&mut self, name: &str, value: u64) {
        let _ = write!(self.line, ",\"{name}\":{value}");
    }

    fn text(&mut self, name: &str, value: &str) {
        let _ = write!(self.line, ",\"{name}\":\"{value}\"");
    }

    fn numbers(&mut self, name: &str, values: impl Iterator<Item = u64>) {
        let _ = write!(self.line, ",\"{name}\":[");
        for (index, value) in values.enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(self.line, "{comma}{value}");
        }
        self.line.push(']');
    }

    fn end(&mut self) {
        self.line.push_str("}\n");
        self.hash.update(self.line.as_bytes());
        if let Some(lines) = &mut self.lines {
            lines.push_str(&self.line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_agreed_and_the_hash_does_not_depend_on_keeping_them() {
        let mut traces = [Trace::new(true), Trace::new(false)];
        for trace in &mut traces {
            trace.event(5, "boot", &[("store", 1), ("inc", 9)]);
            trace.committed(7, (0, 1, 9), (2, 3), &[1, 2]);
            trace.assigned(8, (0, 1, 9), (2, 4), (10, 2), (false, false));
            trace.invoke(9, (1, 4), "write", (3, 2), &[11, 12]);
            trace.mark(10, 1, 2);
        }
        let lines = traces[0].take();
        assert_eq!(
            lines,
            "{\"t\":5,\"k\":\"boot\",\"store\":1,\"inc\":9}\n\
             {\"t\":7,\"k\":\"committed\",\"shard\":0,\"store\":1,\"inc\":9,\"epoch\":2,\"seq\":3,\
             \"acked\":[1,2]}\n\
             {\"t\":8,\"k\":\"assigned\",\"shard\":0,\"store\":1,\"inc\":9,\"epoch\":2,\"seq\":4,\
             \"first\":10,\"count\":2,\"settle\":false}\n\
             {\"t\":9,\"k\":\"invoke\",\"client\":1,\"id\":4,\"op\":\"write\",\"first\":3,\
             \"count\":2,\"values\":[11,12]}\n"
        );
        assert_eq!(traces[0].take(), "", "lines are given once");
        assert_eq!(traces[1].take(), "");
        assert_eq!(traces[0].hash(), traces[1].hash());
        traces[0].mark(11, 0, 0);
        assert_ne!(traces[0].hash(), traces[1].hash());
    }
}
