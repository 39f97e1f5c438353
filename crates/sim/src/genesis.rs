//! What happens outside of time: disks that are laid out before a world begins, and recovery for the
//! checker, which runs on a copy of a disk and leaves no trace.

use crate::disk::{Disk, Fate};
use crate::random::Random;
use crate::store::VOLUME;
use lane::recover::Mounted;
use lane::{Effects, Lane, Mount, MountParameters, MountStep, Op};
use proto::disk::{DiskRequest, IoId};
use proto::seam::Machine;
use proto::{Pool, ReplicaId, Tick};

/// Recover a disk at once, outside of time; the disk must not fail.
pub fn mount_now(
    disk: &mut Disk,
    parameters: &MountParameters,
    pool: &Pool,
    random: &mut Random,
) -> Result<Box<Mounted>, String> {
    let mut mount =
        Mount::new(parameters.clone(), pool.clone()).map_err(|fault| fault.to_string())?;
    let mut results = Vec::new();
    loop {
        match mount.next(std::mem::take(&mut results)) {
            MountStep::Io(batch) => {
                for op in batch {
                    let ticket = disk.submit(DiskRequest { id: IoId(0), op });
                    let done = disk.complete(ticket, Fate::Good, random);
                    results.push(done.expect("it is outstanding").result);
                }
            }
            MountStep::Mounted(mounted) => return Ok(mounted),
            MountStep::Faulted(fault) => return Err(fault.to_string()),
        }
    }
}

/// Give a freshly formatted disk its replicas, outside of time.
pub fn create_replicas(
    disk: &mut Disk,
    parameters: &MountParameters,
    pool: &Pool,
    replicas: &[(ReplicaId, u32)],
    random: &mut Random,
) -> Result<(), String> {
    let mut lane = Lane::open(*mount_now(disk, parameters, pool, random)?, pool.clone());
    let mut out = Effects::default();
    let mut open = 0;
    for (token, (replica, blocks)) in (0..).zip(replicas) {
        let op = Op::Create { replica: *replica, blocks: *blocks, family: VOLUME };
        lane.step(Tick(0), lane::Event::Request(lane::Request { token, op }), &mut out);
        open += 1;
    }
    // Bounded: each round completes all that the one before has asked for.
    for _ in 0..1_000 {
        lane.step(Tick(0), lane::Event::Turn, &mut out);
        for reply in out.replies.drain(..) {
            reply.result.map_err(|problem| problem.to_string())?;
            open -= 1;
        }
        if out.disk.is_empty() {
            break;
        }
        let tickets: Vec<u64> = out.disk.drain(..).map(|request| disk.submit(request)).collect();
        for ticket in tickets {
            let done = disk.complete(ticket, Fate::Good, random);
            let event = lane::Event::Disk(done.expect("it is outstanding"));
            lane.step(Tick(0), event, &mut out);
        }
    }
    if open == 0 { Ok(()) } else { Err(format!("{open} replicas were not created")) }
}
