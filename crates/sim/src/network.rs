//! Who reaches whom, how fast, and what the network does to messages on their way.
//!
//! Peer messages and heartbeats are single messages: they may be lost, come twice, late, and in
//! another order. A client's connection keeps its order (`Stream`): it can only be slow or break.
//! Node 0 is the conductor, node `n` the store with that id.

use crate::random::Random;
use smallvec::SmallVec;

const MICRO: u64 = 1_000;
/// A slow message takes so many times as long.
const SLOW_TIMES: u64 = 100;

/// What kind of message: each kind has its own order on a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    /// Between replicas.
    Peer,
    /// Heartbeats, on connections of their own.
    Heartbeat,
    /// To and from the conductor.
    Control,
}

const LANES: usize = 3;

/// How the network treats messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Quality {
    /// Mean time of a message.
    pub delay_us: u64,
    /// Chance of loss, in ten thousand.
    pub drop: u64,
    /// Chance of a second one.
    pub duplicate: u64,
    /// Chance of a late one.
    pub slow: u64,
    /// Messages overtake one another.
    pub reorders: bool,
}

/// The network.
pub struct Network {
    nodes: usize,
    /// `from * nodes + to`.
    is_cut: Vec<bool>,
    last: Vec<u64>,
    quality: Quality,
}

/// What happened to one message: when it arrives (none: lost), and what was done to it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sent {
    /// Times of arrival.
    pub arrivals: SmallVec<[u64; 2]>,
    /// A partition took it.
    pub is_cut: bool,
    /// It was lost.
    pub is_dropped: bool,
    /// It comes twice.
    pub is_duplicate: bool,
    /// It is late.
    pub is_slow: bool,
}

impl Network {
    /// A whole network of the conductor and `stores` stores.
    #[must_use]
    pub fn new(stores: usize, quality: Quality) -> Network {
        let nodes = stores + 1;
        Network {
            nodes,
            is_cut: vec![false; nodes * nodes],
            last: vec![0; nodes * nodes * LANES],
            quality,
        }
    }

    /// Treat messages like this from now on.
    pub fn set_quality(&mut self, quality: Quality) {
        self.quality = quality;
    }

    /// Whether messages go from one node to the other.
    #[must_use]
    pub fn reaches(&self, from: u64, to: u64) -> bool {
        !self.is_cut[self.link(from, to)]
    }

    /// Cut one direction of a link, or mend it.
    pub fn set_cut(&mut self, from: u64, to: u64, is_cut: bool) {
        let link = self.link(from, to);
        self.is_cut[link] = is_cut;
    }

    /// Mend everything.
    pub fn heal(&mut self) {
        self.is_cut.fill(false);
    }

    fn link(&self, from: u64, to: u64) -> usize {
        from as usize * self.nodes + to as usize
    }

    /// Send one message now.
    pub fn send(&mut self, now: u64, from: u64, to: u64, lane: Lane, random: &mut Random) -> Sent {
        let mut sent = Sent::default();
        let link = self.link(from, to);
        if self.is_cut[link] {
            sent.is_cut = true;
            return sent;
        }
        if random.chance(self.quality.drop) {
            sent.is_dropped = true;
            return sent;
        }
        sent.is_duplicate = random.chance(self.quality.duplicate);
        sent.is_slow = random.chance(self.quality.slow);
        let place = link * LANES + lane as usize;
        for copy in 0..1 + usize::from(sent.is_duplicate) {
            let times =
                if sent.is_slow || copy > 0 && random.below(4) == 0 { SLOW_TIMES } else { 1 };
            let mut at = now + random.around(self.quality.delay_us * MICRO) * times;
            if !self.quality.reorders && copy == 0 {
                at = at.max(self.last[place] + 1);
                self.last[place] = at;
            }
            sent.arrivals.push(at);
        }
        sent
    }
}

/// One direction of a client's connection: in order, at its own speed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stream {
    last: u64,
}

impl Stream {
    /// When what is sent now arrives, if it takes `delay` at least.
    pub fn send(&mut self, now: u64, delay: u64) -> u64 {
        self.last = (now + delay).max(self.last + 1);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(quality: Quality) -> (Network, Random) {
        (Network::new(3, quality), Random::new(5))
    }

    const PLAIN: Quality =
        Quality { delay_us: 100, drop: 0, duplicate: 0, slow: 0, reorders: false };

    #[test]
    fn a_cut_takes_one_direction_of_one_link() {
        let (mut network, mut random) = network(PLAIN);
        network.set_cut(1, 2, true);
        assert!(network.send(0, 1, 2, Lane::Peer, &mut random).is_cut);
        assert_eq!(network.send(0, 2, 1, Lane::Peer, &mut random).arrivals.len(), 1);
        assert!(network.reaches(1, 0) && !network.reaches(1, 2));
        network.heal();
        assert!(!network.send(0, 1, 2, Lane::Peer, &mut random).is_cut);
    }

    #[test]
    fn order_is_kept_unless_the_world_reorders() {
        for reorders in [false, true] {
            let (mut network, mut random) = network(Quality { reorders, ..PLAIN });
            let times: Vec<u64> = (0..200)
                .flat_map(|now| network.send(now, 1, 2, Lane::Peer, &mut random).arrivals)
                .collect();
            let is_ordered = times.windows(2).all(|pair| pair[0] < pair[1]);
            assert_eq!(is_ordered, !reorders);
        }
    }

    #[test]
    fn losses_and_copies_are_about_as_often_as_asked() {
        let quality = Quality { drop: 1_000, duplicate: 1_000, ..PLAIN };
        let (mut network, mut random) = network(quality);
        let sent: Vec<Sent> =
            (0..10_000).map(|now| network.send(now, 1, 2, Lane::Heartbeat, &mut random)).collect();
        let dropped = sent.iter().filter(|sent| sent.is_dropped).count();
        let doubled = sent.iter().filter(|sent| sent.arrivals.len() == 2).count();
        assert!((800..1_200).contains(&dropped) && (700..1_100).contains(&doubled));
    }

    #[test]
    fn a_stream_never_overtakes_itself() {
        let mut stream = Stream::default();
        let times = [stream.send(0, 500), stream.send(1, 2), stream.send(2, 900)];
        assert_eq!(times, [500, 501, 902]);
    }
}
