//! A store node as a whole: what its heartbeat thread says while a device hangs, and what stores tell
//! one another of the conductor.

use super::heart::Limits;
use super::identity::{Prover, nonce};
use super::*;
use crate::disk::FormatOptions;
use crate::faulty::{Faults, Faulty, Folder};
use proto::frame::OutFrame;
use proto::wire::{
    HEADER_BYTES, Header, Hello, Kind, Limits as WireLimits, PathSlot, Peer, Ping, Reply, ReplyOp,
    Request, RequestOp, VersionRange, Who,
};
use proto::{Epoch, ReplicaId, VolumeId};
use shard::conf::Member;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

const CLUSTER: [u8; 16] = [5; 16];
/// Nothing here takes longer unless it is broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// Store 1 in this process, over one disk whose device obeys `faults`.
fn start(folder: &Folder, faults: &Arc<Faults>, limits: Limits) -> (StoreNode, String) {
    start_as(1, folder, faults, limits)
}

/// The same with another number; its incarnation is ten times that.
fn start_as(
    store_id: u64,
    folder: &Folder,
    faults: &Arc<Faults>,
    limits: Limits,
) -> (StoreNode, String) {
    let path = folder.path(&format!("disk{store_id}.img"));
    let options = FormatOptions {
        size_bytes: Some(256 << 20),
        cluster_id: CLUSTER,
        journal_bytes: Some(16 << 20),
        durability: None,
    };
    let header = disk::format(&path, &options).expect("formatted");
    let config = StoreConfig {
        store_id,
        incarnation: store_id * 10,
        cluster_id: CLUSTER,
        cluster_key: b"key".to_vec(),
        listen: "127.0.0.1:0".parse().expect("an address"),
        disks: vec![DiskConfig { path, engine: EngineChoice::Auto, failure: None }],
    };
    let open = OpenStore::open(config);
    let node = open.start_with(limits, |engine| Faulty::around(engine, faults)).expect("started");
    (node, disk::hex(&header.disk_uuid))
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

/// Store 2, as far as heartbeats go.
struct Neighbour {
    stream: TcpStream,
    incarnation: u64,
}

impl Neighbour {
    fn connect(node: &StoreNode) -> Neighbour {
        let stream = TcpStream::connect(node.address()).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
        let mut neighbour = Neighbour { stream, incarnation: 20 };
        let identity = Identity {
            store: 2,
            incarnation: 20,
            cluster_id: CLUSTER,
            cluster_key: b"key".to_vec(),
        };
        let own = identity.peer(nonce(), [0; 32]);
        let called = neighbour.hello(own);
        let sides = (&own, &called);
        assert!(identity.verify(Kind::Heartbeat, Prover::Called, sides, &called.proof));
        let proof = identity.prove(Kind::Heartbeat, Prover::Caller, &own, &called);
        neighbour.hello(Peer { proof, ..own });
        neighbour
    }

    fn hello(&mut self, own: Peer) -> Peer {
        let hello = Hello {
            versions: VersionRange::OWN,
            features: 0,
            cluster_id: CLUSTER,
            lane: 0,
            path: PathSlot { slot: 0, generation: 0 },
            limits: WireLimits::DEFAULT,
            who: Who::Heartbeat(own),
        };
        self.send(RequestOp::Hello(Box::new(hello)));
        let ReplyOp::Hello(hello) = self.receive() else { panic!("HELLO is answered by HELLO") };
        hello.peer
    }

    fn send(&mut self, op: RequestOp) {
        let request = Request {
            command_id: 1,
            shard: ShardId::default(),
            epoch: Epoch(0),
            attach_epoch: 0,
            is_fua: false,
            op,
        };
        let OutFrame { head, payload } = request.encode();
        let mut bytes = head.to_vec();
        payload.iter().for_each(|buf| bytes.extend_from_slice(buf));
        self.stream.write_all(&bytes).expect("sent");
    }

    fn receive(&mut self) -> ReplyOp {
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head).expect("a header");
        let header = Header::parse(&head).expect("well formed");
        let (meta, payload) = (header.body.meta_bytes, header.body.payload_bytes);
        let mut body = vec![0; (meta + payload) as usize];
        self.stream.read_exact(&mut body).expect("a body");
        let payload = body.split_off(meta as usize);
        let pool = Pool::new(1 << 20);
        let mut frame = proto::frame::Frame {
            header: head.as_slice().into(),
            meta: body.as_slice().into(),
            payload: Default::default(),
        };
        if !payload.is_empty() {
            frame.payload.push(pool.copy_of(&payload).freeze());
        }
        Reply::parse(&header, frame).expect("a reply").result.expect("not a refusal")
    }

    fn ping(&mut self, sequence: u64) {
        self.ping_following(sequence, Followed::default());
    }

    fn ping_following(&mut self, sequence: u64, followed: Followed) {
        let (store, incarnation) = (2, self.incarnation);
        let Followed { term, lineage, revision } = followed;
        let ping = Ping { sequence, store, incarnation, peer_incarnation: 10, ..Ping::default() };
        self.send(RequestOp::Ping(Ping { term, lineage, revision, ..ping }));
    }

    /// The next heartbeat's answer.
    fn answer(&mut self) -> Ping {
        let ReplyOp::Ping(ping) = self.receive() else { panic!("PING is answered by PING") };
        ping
    }

    /// The number of the next heartbeat that is answered.
    fn answered(&mut self) -> u64 {
        self.answer().sequence
    }
}

/// The limits of these do not matter: nothing hangs.
const CALM: Limits = Limits { thread_ms: 60_000, device_ms: 60_000 };

#[test]
fn heartbeats_and_their_answers_tell_which_conductor_a_store_follows() {
    let (folder, faults) = (Folder::new(), Arc::new(Faults::default()));
    let (mut first, uuid) = start_as(1, &folder, &faults, CALM);
    let (mut second, second_uuid) = start_as(2, &folder, &faults, CALM);
    let peers = [(1, &first), (2, &second)].map(|(store, node)| PeerAddress {
        store,
        incarnation: store * 10,
        address: node.address(),
    });
    first.set_conductor(Followed { term: 3, lineage: 7, revision: 40 });
    second.set_conductor(Followed { term: 2, lineage: 7, revision: 35 });
    let shard = ShardId { volume: VolumeId(9), index: 0 };
    let member = |copy: u8| Member {
        copy,
        store: u64::from(copy) + 1,
        incarnation: (u64::from(copy) + 1) * 10,
        disk: [copy; 16],
        format_uuid: [copy; 16],
    };
    let conf = ShardConf {
        shard,
        epoch: Epoch(1),
        rf: 2,
        min_write: 1,
        primary: 0,
        isr: vec![0, 1],
        learners: Vec::new(),
        members: vec![member(0), member(1)],
        history_id: 1,
        attach_epoch: 0,
    };
    // As primary, the first asks the second for leases; the second only answers.
    for (copy, node, disk_uuid) in [(0, &first, uuid), (1, &second, second_uuid)] {
        assert!(node.set_peers(peers.to_vec()));
        let (replica, conf) = (ReplicaId { shard, copy }, conf.clone());
        assert!(node.control(1, ControlOp::Create { disk_uuid, replica, blocks: 64, conf }));
    }
    until("the second has heard the first", || {
        second.heard_conductor() == Followed { term: 3, lineage: 7, revision: 40 }
    });
    until("the first has heard the second's answer", || {
        first.heard_conductor() == Followed { term: 2, lineage: 7, revision: 35 }
    });
    second.set_conductor(Followed { term: 4, lineage: 7, revision: 50 });
    until("what a store is told later is said from then on", || {
        first.heard_conductor() == Followed { term: 4, lineage: 7, revision: 50 }
    });
    assert_eq!(second.heard_conductor().term, 3, "what a store hears it does not say as its own");
    first.close();
    second.close();
}

#[test]
fn what_heartbeats_say_of_the_conductor_is_the_newest_and_of_a_proven_store() {
    let (folder, faults) = (Folder::new(), Arc::new(Faults::default()));
    let (mut node, _) = start(&folder, &faults, CALM);
    assert_eq!(node.heard_conductor(), Followed::default());
    let mut neighbour = Neighbour::connect(&node);
    neighbour.ping_following(1, Followed { term: 5, lineage: 7, revision: 60 });
    let answer = neighbour.answer();
    assert_eq!((answer.term, answer.lineage, answer.revision), (0, 0, 0), "it was told nothing");
    assert_eq!(node.heard_conductor(), Followed { term: 5, lineage: 7, revision: 60 });

    node.set_conductor(Followed { term: 4, lineage: 7, revision: 55 });
    node.set_conductor(Followed { term: 3, lineage: 7, revision: 90 });
    neighbour.ping_following(2, Followed { term: 4, lineage: 7, revision: 70 });
    let answer = neighbour.answer();
    assert_eq!((answer.term, answer.lineage, answer.revision), (4, 7, 55));
    assert_eq!(node.heard_conductor(), Followed { term: 5, lineage: 7, revision: 60 });

    // One that has proved to be store 2 speaks for no other.
    let ping = Ping { sequence: 3, store: 3, incarnation: 30, term: 99, ..Ping::default() };
    neighbour.send(RequestOp::Ping(ping));
    let mut rest = Vec::new();
    neighbour.stream.read_to_end(&mut rest).expect("it is refused, and the connection ended");
    assert_eq!(node.heard_conductor(), Followed { term: 5, lineage: 7, revision: 60 });
    node.close();
}

/// A device that hangs lets its lane live and its process tick: only the age of its operations tells.
#[test]
fn a_store_whose_device_hangs_is_not_vouched_for_until_it_answers_again() {
    let (folder, faults) = (Folder::new(), Arc::new(Faults::default()));
    // The thread may be as late as it likes: this test is about the device.
    let limits = Limits { thread_ms: 60_000, device_ms: 1_000 };
    let (short, long) = (500_000_000, 1_000_000_000);
    let (mut node, disk_uuid) = start(&folder, &faults, limits);
    let mut neighbour = Neighbour::connect(&node);
    let age = |node: &StoreNode| node.handle.oldest_io_nanos(clock::now());
    // A new disk is being made ready in the background, so there may be operations already.
    until("the device is quick", || age(&node) < short);
    neighbour.ping(1);
    assert_eq!(neighbour.answered(), 1);

    faults.hold(true);
    let shard = ShardId { volume: VolumeId(9), index: 0 };
    let replica = ReplicaId { shard, copy: 0 };
    let uuids = ([0; 16], [0; 16]);
    let member = Member { copy: 0, store: 1, incarnation: 10, disk: uuids.0, format_uuid: uuids.1 };
    let conf = ShardConf {
        shard,
        epoch: Epoch(1),
        rf: 1,
        min_write: 1,
        primary: 0,
        isr: vec![0],
        learners: Vec::new(),
        members: vec![member],
        history_id: 1,
        attach_epoch: 0,
    };
    assert!(node.control(1, ControlOp::Create { disk_uuid, replica, blocks: 64, conf }));
    until("the operation grows old", || age(&node) >= long);
    let frames = node.heart.metrics().received_frames.get();
    neighbour.ping(2);
    until("the heartbeat is there", || node.heart.metrics().received_frames.get() > frames);
    assert!(age(&node) >= long, "it had not been answered meanwhile");
    assert!(node.handle.age_nanos(clock::now()) < 60_000_000_000, "the thread itself lives");

    let told = node.facts().expect("its thread runs").disks[0].oldest_io_nanos;
    assert!(told >= long, "the control plane sees it as well");
    faults.hold(false);
    until("the device answers", || age(&node) < short);
    neighbour.ping(3);
    assert_eq!(neighbour.answered(), 3, "the one in between was not answered, and never will be");
    until("the replica is there", || {
        node.drain().iter().any(|event| matches!(event, StoreEvent::Done { request_id: 1 }))
    });
    let latency = &node.facts().expect("its thread runs").disks[0].latency;
    assert!(latency.writes.quantile(1000) >= long, "what it took is counted when it is over");
    assert!(latency.writes.quantile(1) < short, "and those before, which were quick");
    node.close();
}

#[test]
fn the_limits_are_those_of_the_protocol() {
    let Limits { thread_ms, device_ms } = Limits::default();
    assert_eq!((thread_ms, device_ms), (500, 5_000));
}

/// A store with one good disk, in the third place, among bad ones of each kind.
fn among_bad_disks(folder: &Folder) -> StoreConfig {
    let format = |name: &str, cluster_id| {
        let options = FormatOptions {
            size_bytes: Some(256 << 20),
            cluster_id,
            journal_bytes: Some(16 << 20),
            durability: None,
        };
        disk::format(&folder.path(name), &options).expect("formatted");
    };
    ["good.img", "cut.img"].iter().for_each(|name| format(name, CLUSTER));
    format("foreign.img", [9; 16]);
    std::fs::File::options()
        .write(true)
        .open(folder.path("cut.img"))
        .and_then(|file| file.set_len(64 << 20))
        .expect("cut");
    std::fs::write(folder.path("empty.img"), []).expect("made");
    let named = |name: &str, failure: Option<&str>| DiskConfig {
        path: folder.path(name),
        engine: EngineChoice::Auto,
        failure: failure.map(str::to_owned),
    };
    StoreConfig {
        store_id: 1,
        incarnation: 10,
        cluster_id: CLUSTER,
        cluster_key: b"key".to_vec(),
        listen: "127.0.0.1:0".parse().expect("an address"),
        disks: vec![
            named("missing.img", None),
            named("cut.img", None),
            named("good.img", None),
            named("empty.img", None),
            named("foreign.img", None),
            named("unmounted.img", Some("it is not mounted")),
        ],
    }
}

/// Make a shard's only replica on a disk of store 1.
fn creation(volume: u64, disk_uuid: &str) -> ControlOp {
    let shard = ShardId { volume: VolumeId(volume), index: 0 };
    let member = Member { copy: 0, store: 1, incarnation: 10, disk: [1; 16], format_uuid: [1; 16] };
    let conf = ShardConf {
        shard,
        epoch: Epoch(1),
        rf: 1,
        min_write: 1,
        primary: 0,
        isr: vec![0],
        learners: Vec::new(),
        members: vec![member],
        history_id: 1,
        attach_epoch: 0,
    };
    let replica = ReplicaId { shard, copy: 0 };
    ControlOp::Create { disk_uuid: disk_uuid.to_owned(), replica, blocks: 64, conf }
}

/// Events up to the answer to this command.
fn events_until(node: &StoreNode, number: u64) -> Vec<StoreEvent> {
    let is_answer = |event: &StoreEvent| match event {
        StoreEvent::Done { request_id } | StoreEvent::Failed { request_id, .. } => {
            *request_id == number
        }
        StoreEvent::Verified { .. }
        | StoreEvent::Proposal { .. }
        | StoreEvent::FetchConf { .. }
        | StoreEvent::DiskFailed { .. } => false,
    };
    let mut events = Vec::new();
    until("a command is answered", || {
        events.extend(node.drain());
        events.iter().any(is_answer)
    });
    events
}

fn failed_disks(events: &[StoreEvent]) -> usize {
    events.iter().filter(|event| matches!(event, StoreEvent::DiskFailed { .. })).count()
}

/// Said once, however often the store looks at its disks afterwards.
#[test]
fn a_disk_that_was_stopped_takes_no_replica() {
    let (folder, faults) = (Folder::new(), Arc::new(Faults::default()));
    let (mut node, disk_uuid) = start(&folder, &faults, Limits::default());
    assert!(node.fail_disk(0, "it was exchanged".to_owned()));
    assert!(node.control(1, creation(9, &disk_uuid)));
    let mut events = events_until(&node, 1);
    assert!(events.iter().any(|event| {
        matches!(event, StoreEvent::Failed { status: Status::DiskFailed, message, .. }
            if message.contains("has stopped"))
    }));
    assert!(node.control(2, creation(10, &disk_uuid)));
    events.extend(events_until(&node, 2));
    assert_eq!(failed_disks(&events), 1);
    node.close();
}

/// A disk that cannot be read is one failure, not the end of its store.
#[test]
fn a_store_serves_the_disks_that_it_can_and_says_what_is_wrong_with_the_others() {
    let folder = Folder::new();
    let mut node = OpenStore::open(among_bad_disks(&folder)).start().expect("started");
    let disks = node.facts().expect("it runs").disks;
    let said: Vec<&str> =
        disks.iter().map(|disk| disk.failure.as_deref().unwrap_or("served")).collect();
    let expected =
        ["No such file", "was truncated", "served", "ends before", "belongs to", "not mounted"];
    for (said, expected) in said.iter().zip(expected) {
        assert!(said.contains(expected), "{said} does not say: {expected}");
    }
    assert!(node.control(1, creation(9, &disks[2].uuid)));
    let mut events = Vec::new();
    until("a replica is made on the good disk", || {
        events.extend(node.drain());
        events.iter().any(|event| matches!(event, StoreEvent::Done { request_id: 1 }))
    });
    assert!(node.fail_disk(2, "another file is in its place".to_owned()));
    until("and it stops when somebody sees that it is another one", || {
        events.extend(node.drain());
        events.iter().any(|event| {
            matches!(event, StoreEvent::DiskFailed { disk: 2, message }
            if message == "another file is in its place")
        })
    });
    assert!(
        !events
            .iter()
            .any(|event| matches!(event, StoreEvent::DiskFailed { disk, .. } if *disk != 2)),
        "what failed before the start is in the picture of the store, not news"
    );
    assert!(node.facts().expect("it runs").disks[2].failure.is_some());
    node.close();
}
