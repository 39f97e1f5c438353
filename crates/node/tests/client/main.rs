//! The client side of the data path, over real sockets: NBD client, gateway, session, store.
//!
//! The store is a small honest one (`store.rs`); what the session does when it misbehaves is
//! explored in `shard`, without sockets and without time.

mod nbd;
mod store;

use nbd::{Client, DISC, FLUSH, READ, TRIM, WRITE, ZEROES};
use node::gateway::NbdAdoption;
use node::{ClientEvent, ClientProblem, Gateway, Volume};
use proto::Status;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::{CLUSTER, Disk, SIZE_BYTES, Store, spec};

const HANDLE: u64 = 9;
/// Bound of waits for an event.
const PATIENCE: Duration = Duration::from_secs(60);

fn random_from(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) % below
    }
}

fn adopt(gateway: &Gateway, is_read_only: bool) -> (Client, u64) {
    let (client, socket) = Client::pair();
    let adoption = NbdAdoption {
        socket,
        leftover: Vec::new(),
        handle: HANDLE,
        is_structured: false,
        is_read_only,
    };
    let id = gateway.adopt_nbd(adoption).expect("adopted");
    (client, id)
}

/// A gateway with the volume open.
fn gateway(store: &Store) -> Gateway {
    let gateway = Gateway::start(CLUSTER).expect("started");
    gateway.open_volume(HANDLE, spec(store.address, 1)).expect("opened");
    gateway
}

/// Wait until `is_there` finds its event; every turn waits for the gateway's own loop.
fn wait_for(gateway: &Gateway, mut is_there: impl FnMut(&ClientEvent) -> bool) -> ClientEvent {
    let until = Instant::now() + PATIENCE;
    loop {
        gateway.stats().expect("alive");
        if let Some(event) = gateway.drain().into_iter().find(|event| is_there(event)) {
            return event;
        }
        assert!(Instant::now() < until, "the event did not come");
        std::thread::yield_now();
    }
}

/// Wait until so many writes lie at a store that holds them.
fn wait_until_held(store: &Store, count: usize) {
    let until = Instant::now() + PATIENCE;
    while store.held() < count {
        assert!(Instant::now() < until, "{} of {count} writes have come", store.held());
        std::thread::yield_now();
    }
}

#[test]
fn what_an_nbd_client_writes_is_what_it_reads() {
    let disk = Disk::new();
    let store = Store::start(&disk, 0, 1, 1);
    let gateway = gateway(&store);
    let (mut client, _) = adopt(&gateway, false);
    let mut model = vec![0u8; SIZE_BYTES as usize];
    let mut draw = random_from(3);
    for turn in 0..400 {
        let sectors = 1 + draw(if turn % 20 == 0 { 6000 } else { 40 });
        let first = draw(SIZE_BYTES / 512 - sectors);
        let (offset, length) = (first * 512, (sectors * 512) as u32);
        let place = offset as usize..offset as usize + length as usize;
        match draw(5) {
            0 | 1 => {
                let data: Vec<u8> = (0..length).map(|at| (at as u64 * 7 + draw(9)) as u8).collect();
                assert_eq!(client.run(WRITE, offset, length, &data).0, 0);
                model[place].copy_from_slice(&data);
            }
            2 => {
                assert_eq!(client.run(TRIM, offset, length, &[]).0, 0);
                model[place].fill(0);
            }
            3 => {
                assert_eq!(client.run(ZEROES, offset, length, &[]).0, 0);
                model[place].fill(0);
            }
            _ => {
                let (error, data) = client.run(READ, offset, length, &[]);
                assert!(error == 0 && data == model[place], "turn {turn}");
            }
        }
    }
    assert_eq!(client.run(FLUSH, 0, 0, &[]).0, 0);
    assert!(disk.bytes.lock().expect("not poisoned")[..model.len()] == model[..]);
    // A second connection to the same volume sees the same.
    let (mut other, _) = adopt(&gateway, true);
    let (error, data) = other.run(READ, 4096, 3 << 20, &[]);
    assert!(error == 0 && data == model[4096..4096 + (3 << 20)]);
    assert_eq!(other.run(WRITE, 0, 512, &[0; 512]).0, 1, "EPERM: adopted read-only");
    let stats = gateway.stats().expect("alive");
    assert_eq!((stats.len(), stats[0].connections, stats[0].open_requests), (1, 2, 0));
    assert!(stats[0].session.requests >= 400 && stats[0].session.errors == 0);
}

#[test]
fn wrong_requests_cost_an_errno_and_not_the_connection() {
    let store = Store::start(&Disk::new(), 0, 1, 1);
    let gateway = gateway(&store);
    let (mut client, id) = adopt(&gateway, false);
    assert_eq!(client.run(READ, SIZE_BYTES, 512, &[]).0, 22, "EINVAL");
    assert_eq!(client.run(WRITE, SIZE_BYTES - 512, 1024, &[1; 1024]).0, 28, "ENOSPC");
    assert_eq!(client.run(READ, 100, 512, &[]).0, 22);
    assert_eq!(client.run(READ, SIZE_BYTES - 512, 512, &[]).0, 0);
    // What is no NBD at all ends it, with a reason.
    client.raw(&[7; 28]);
    client.expect_end();
    let event = wait_for(&gateway, |event| matches!(event, ClientEvent::Closed { .. }));
    let ClientEvent::Closed { conn, reason } = event else { unreachable!("asked for that") };
    assert!(conn == id && reason.contains("magic"), "{reason}");
}

#[test]
fn more_than_may_be_in_flight_waits_in_the_socket() {
    let store = Store::start(&Disk::new(), 0, 1, 1);
    let gateway = gateway(&store);
    let (mut client, _) = adopt(&gateway, false);
    store.hold(true);
    // 32 more than are taken: they fit into the socket's buffer.
    for n in 0..160u64 {
        client.ask(WRITE, n * 4096, 512, &[n as u8; 512]);
    }
    wait_until_held(&store, 128);
    let stats = gateway.stats().expect("alive");
    assert_eq!((store.held(), stats[0].open_requests), (128, 128), "and not one more");
    assert_eq!(store.hold(false), 128);
    while client.outstanding() > 0 {
        assert_eq!(client.reply().1, 0);
    }
    for n in 0..160u64 {
        assert_eq!(client.run(READ, n * 4096, 512, &[]), (0, vec![n as u8; 512]));
    }
}

/// Keep `depth` writes in flight while `disturb` is called now and then; then read all back.
fn write_through(client: &mut Client, turns: u64, mut disturb: impl FnMut(u64)) {
    let blocks = SIZE_BYTES / 4096;
    let mut draw = random_from(11);
    let mut model = vec![0u64; blocks as usize];
    let mut busy = std::collections::BTreeMap::new();
    for turn in 1..=turns {
        let block = loop {
            let block = draw(blocks);
            if !busy.values().any(|other| *other == block) {
                break block;
            }
        };
        let data = turn.to_le_bytes().repeat(512);
        busy.insert(client.ask(WRITE, block * 4096, 4096, &data), block);
        model[block as usize] = turn;
        if turn % 100 == 0 {
            // Nothing is under way when a disturbance begins, so that less than 64 more can be.
            while client.outstanding() > 0 {
                assert_eq!(client.reply().1, 0, "no error reaches the client");
            }
            busy.clear();
        }
        disturb(turn);
        while busy.len() >= 64 {
            let (cookie, error, _) = client.reply();
            assert_eq!(error, 0, "no error reaches the client");
            busy.remove(&cookie);
        }
    }
    while client.outstanding() > 0 {
        assert_eq!(client.reply().1, 0);
    }
    for (block, value) in (0..).zip(&model) {
        let (error, data) = client.run(READ, block * 4096, 4096, &[]);
        assert!(error == 0 && data == value.to_le_bytes().repeat(512), "block {block}");
    }
}

#[test]
fn a_store_that_dies_and_comes_back_under_load_costs_nothing_but_time() {
    let disk = Disk::new();
    let mut store = Some(Store::start(&disk, 0, 1, 1));
    let first = store.as_ref().expect("started");
    let gateway = gateway(first);
    let (mut client, _) = adopt(&gateway, false);
    let mut epoch = 1;
    write_through(&mut client, 3000, |turn| match turn {
        // Held, so that writes are surely under way when it dies.
        400 | 1400 | 2400 => {
            store.as_ref().expect("runs").hold(true);
        }
        450 | 1450 | 2450 => {
            let old = store.take().expect("runs");
            wait_until_held(&old, 30);
            let port = old.stop();
            if turn > 1000 {
                // A restarted replica serves again in a newer epoch (T6).
                epoch += 1;
            }
            store = Some(Store::start(&disk, port, turn, epoch));
            if turn > 1000 {
                let needed = |event: &ClientEvent| {
                    matches!(event, ClientEvent::ConfNeeded { handle: HANDLE, .. })
                };
                let until = Instant::now() + PATIENCE;
                while disk.counts().stale == 0 {
                    assert!(Instant::now() < until, "the old epoch is still used");
                    std::thread::yield_now();
                }
                wait_for(&gateway, needed);
                let address = store.as_ref().expect("runs").address;
                gateway.update_volume(HANDLE, spec(address, epoch)).expect("newer");
                disk.count(|counts| counts.stale = 0);
            }
        }
        _ => {}
    });
    let counts = disk.counts();
    assert_eq!((counts.fences, counts.outcomes), (0, 0), "slots end with the reign");
    assert!(counts.hellos >= 8, "{counts:?}");
}

#[test]
fn lost_connections_to_a_living_store_are_fenced() {
    let disk = Disk::new();
    let store = Store::start(&disk, 0, 1, 1);
    let gateway = gateway(&store);
    let (mut client, _) = adopt(&gateway, false);
    write_through(&mut client, 2000, |turn| match turn {
        500 | 1500 => {
            store.hold(true);
        }
        540 | 1540 => {
            wait_until_held(&store, 30);
            store.cut();
        }
        550 | 1550 => {
            // They are settled before they are let go.
            let until = Instant::now() + PATIENCE;
            while disk.counts().outcomes < turn / 1000 * 30 + 30 {
                assert!(Instant::now() < until, "the writes that lie are asked about");
                std::thread::yield_now();
            }
            store.hold(false);
        }
        800 | 900 => store.cut(),
        _ => {}
    });
    let counts = disk.counts();
    assert!(counts.fences > 0 && counts.outcomes > 0, "{counts:?}");
    let resent = gateway.stats().expect("alive")[0].session.resent;
    assert!(counts.writes <= 2000 + resent, "{counts:?}, {resent} sent again");
}

#[test]
fn clients_leave_and_volumes_close_in_order() {
    let store = Store::start(&Disk::new(), 0, 1, 1);
    let gateway = gateway(&store);
    let (mut leaving, id) = adopt(&gateway, false);
    assert_eq!(leaving.run(WRITE, 0, 512, &[1; 512]).0, 0);
    leaving.raw(&Client::header(DISC, 0, 0, 0));
    leaving.expect_end();
    drop(leaving);
    let reason = "disconnected by the client".to_owned();
    let expected = ClientEvent::Closed { conn: id, reason };
    wait_for(&gateway, |event| *event == expected);

    let (mut client, _) = adopt(&gateway, false);
    store.hold(true);
    client.ask(WRITE, 0, 4096, &[2; 4096]);
    wait_until_held(&store, 1);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let closing = scope.spawn(|| gateway.close_volume(HANDLE));
        // It has begun when the handle is not to be had any more.
        while gateway.update_volume(HANDLE, spec(store.address, 1)).is_ok() {
            std::thread::yield_now();
        }
        assert_eq!(client.run_refused(), 108, "ESHUTDOWN for what comes now");
        store.hold(false);
        assert_eq!(client.reply().1, 0, "what was under way is answered");
        client.expect_end();
        drop(client);
        closing.join().expect("no panic").expect("closed");
    });
    assert!(begun.elapsed() < Duration::from_millis(node::gateway::CLOSE_MS));
    gateway.open_volume(HANDLE, spec(store.address, 1)).expect("the handle is free again");
    gateway.close();
    assert!(matches!(gateway.stats(), Err(ClientProblem::Stopped)));
}

#[test]
fn a_close_does_not_wait_for_a_store_that_is_away() {
    let store = Store::start(&Disk::new(), 0, 1, 1);
    let gateway = gateway(&store);
    let (mut client, _) = adopt(&gateway, false);
    assert_eq!(client.run(FLUSH, 0, 0, &[]).0, 0);
    store.stop();
    client.ask(WRITE, 0, 4096, &[2; 4096]);
    wait_for(&gateway, |event| matches!(event, ClientEvent::ConfNeeded { handle: HANDLE, .. }));
    gateway.close_volume(HANDLE).expect("closed");
    client.expect_end();
}

#[test]
fn handles_and_descriptions_are_checked() {
    let store = Store::start(&Disk::new(), 0, 1, 1);
    let gateway = gateway(&store);
    let again = gateway.open_volume(HANDLE, spec(store.address, 1)).expect_err("in use");
    assert_eq!(again.status(), Status::InUse);
    let unknown = gateway.update_volume(1, spec(store.address, 1)).expect_err("unknown");
    assert_eq!(unknown.status(), Status::NotFound);
    assert!(gateway.close_volume(1).is_err());
    let (_, socket) = Client::pair();
    let adoption = NbdAdoption {
        socket,
        leftover: Vec::new(),
        handle: 1,
        is_structured: false,
        is_read_only: false,
    };
    assert_eq!(gateway.adopt_nbd(adoption).expect_err("unknown").status(), Status::NotFound);
}

#[test]
fn a_store_of_another_cluster_is_not_used() {
    let disk = Disk::new();
    let store = Store::start(&disk, 0, 1, 1);
    let volume = Volume::open(*b"another-cluster!", spec(store.address, 1), None).expect("opened");
    let pending = volume.begin(proto::block::BlockOp::Read { offset: 0, len: 512 }).expect("begun");
    let until = Instant::now() + PATIENCE;
    while disk.counts().refused_hellos < 4 {
        assert!(Instant::now() < until, "it is tried again and again");
        assert!(pending.wait_for(Duration::from_millis(1)).is_none(), "it waits");
    }
    assert!(!volume.drain().is_empty(), "somebody is asked for help");
    volume.close();
    let end = pending.wait().expect_err("closed");
    assert_eq!(end.status(), Status::Cancelled);
}

#[test]
fn a_volume_serves_many_threads() {
    let disk = Disk::new();
    let store = Store::start(&disk, 0, 1, 1);
    let volume = Volume::open(CLUSTER, spec(store.address, 1), None).expect("opened");
    assert_eq!(volume.size_bytes(), SIZE_BYTES);
    let volume = Arc::new(volume);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let volume = Arc::clone(&volume);
            scope.spawn(move || {
                let base = thread * 2 * 1024 * 1024;
                for turn in 0..100u64 {
                    let bytes = vec![(thread * 100 + turn) as u8; 512 * (1 + turn as usize % 30)];
                    let offset = base + turn * 512;
                    volume.pwrite(offset, &bytes).expect("written");
                    let mut back = vec![0; bytes.len()];
                    volume.pread(offset, &mut back).expect("read");
                    assert!(back == bytes);
                }
            });
        }
    });
    volume.flush().expect("flushed");
    volume.discard(0, 1 << 20).expect("discarded");
    volume.write_zeroes(2 << 20, 1 << 20).expect("zeroed");
    let mut back = vec![1; 1 << 20];
    volume.pread(2 << 20, &mut back).expect("read");
    assert!(back.iter().all(|byte| *byte == 0));
    let problem = volume.pwrite(SIZE_BYTES, &[0; 512]).expect_err("beyond the end");
    assert_eq!(problem.status(), Status::OutOfRange);
    assert_eq!(volume.pread(1, &mut [0; 512]).expect_err("odd").status(), Status::Misaligned);
    assert_eq!(volume.counters().expect("alive").errors, 2);
    volume.close();
    assert_eq!(volume.flush().expect_err("closed").status(), Status::Cancelled);
}
