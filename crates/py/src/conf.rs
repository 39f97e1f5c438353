//! Configurations of shards for Python, which decides what to propose and stores what comes out.
//!
//! Dictionaries have exactly the fields of `pureflash.model.domain.ShardConf`; those of proposals and
//! facts are described by `pureflash.model.conf`, the typed face of these four functions.

use crate::errors::raise;
use node::disk::hex;
use proto::{Epoch, Lsn, Seq, ShardId, Status, VolumeId};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use shard::conf::codec::ConfError;
use shard::conf::transition::{Facts, Proposer, Refusal, Registration, Transition, apply};
use shard::conf::{CopyId, Member, ShardConf};

/// Make the first configuration of a shard: epoch 1, every member in the ISR.
///
/// Errors: INVALID when that would be no sound configuration.
#[pyfunction]
#[pyo3(signature = (
    *, volume_id, index, rf, min_write, primary, members, history_id, attach_epoch
))]
#[expect(clippy::too_many_arguments, reason = "the fields of a configuration, by keyword only")]
pub fn conf_first<'py>(
    py: Python<'py>,
    volume_id: u64,
    index: u32,
    rf: u8,
    min_write: u8,
    primary: CopyId,
    members: Vec<Bound<'py, PyDict>>,
    history_id: u64,
    attach_epoch: u64,
) -> PyResult<Bound<'py, PyDict>> {
    let members = members.iter().map(read_member).collect::<PyResult<_>>()?;
    let shard = ShardId { volume: VolumeId(volume_id), index };
    let ids = (history_id, attach_epoch);
    let conf = ShardConf::first(shard, (rf, min_write), primary, members, ids).map_err(unsound)?;
    write_conf(py, &conf)
}

/// Apply T1 to T9 to a configuration; `epoch` is the one that the proposal names.
///
/// Errors: STALE_EPOCH for a proposal of another epoch, INVALID with the guard that forbids it, and
/// for a configuration that is none.
#[pyfunction]
pub fn conf_apply<'py>(
    py: Python<'py>,
    conf: &Bound<'py, PyDict>,
    epoch: u64,
    transition: &Bound<'py, PyDict>,
    facts: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyDict>> {
    let conf = read_conf(conf)?;
    let (transition, facts) = (read_transition(transition)?, read_facts(facts)?);
    let next = apply(&conf, Epoch(epoch), &transition, &facts).map_err(|refusal| {
        let is_stale = matches!(refusal, Refusal::WrongEpoch { .. });
        let status = if is_stale { Status::StaleEpoch } else { Status::Invalid };
        raise(status, &refusal.to_string())
    })?;
    write_conf(py, &next)
}

/// The bytes of a configuration, as replicas keep them. Errors: INVALID when it is not sound.
#[pyfunction]
pub fn conf_encode<'py>(
    py: Python<'py>,
    conf: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(py, &read_conf(conf)?.encode()))
}

/// Read the bytes of one configuration. Errors: INVALID with the first rule that they break.
#[pyfunction]
pub fn conf_decode<'py>(py: Python<'py>, encoded: &[u8]) -> PyResult<Bound<'py, PyDict>> {
    write_conf(py, &ShardConf::decode(encoded).map_err(unsound)?)
}

fn unsound(error: ConfError) -> PyErr {
    raise(Status::Invalid, &error.to_string())
}

fn get<'py, T>(dict: &Bound<'py, PyDict>, name: &str) -> PyResult<T>
where
    T: for<'a> FromPyObject<'a, 'py, Error: Into<PyErr>>,
{
    let missing = || raise(Status::Invalid, &format!("there is no {name:?}"));
    dict.get_item(name)?.ok_or_else(missing)?.extract().map_err(Into::into)
}

/// 32 hexadecimal digits, as identities of disks are shown.
fn read_identity(dict: &Bound<'_, PyDict>, name: &str) -> PyResult<[u8; 16]> {
    let text: String = get(dict, name)?;
    let digit = |at: usize| char::from(*text.as_bytes().get(at)?).to_digit(16);
    let mut bytes = [0; 16];
    let mut is_good = text.len() == 32;
    for (place, byte) in bytes.iter_mut().enumerate() {
        match (digit(2 * place), digit(2 * place + 1)) {
            (Some(high), Some(low)) => *byte = u8::try_from(high << 4 | low).expect("two digits"),
            (_, None) | (None, _) => is_good = false,
        }
    }
    let refuse = || raise(Status::Invalid, &format!("{name} is {text:?}, not 32 hex digits"));
    is_good.then_some(bytes).ok_or_else(refuse)
}

fn read_member(dict: &Bound<'_, PyDict>) -> PyResult<Member> {
    Ok(Member {
        copy: get(dict, "copy")?,
        store: get(dict, "store")?,
        incarnation: get(dict, "incarnation")?,
        disk: read_identity(dict, "disk")?,
        format_uuid: read_identity(dict, "format_uuid")?,
    })
}

fn read_members(dict: &Bound<'_, PyDict>, name: &str) -> PyResult<Vec<Member>> {
    get::<Vec<Bound<'_, PyDict>>>(dict, name)?.iter().map(read_member).collect()
}

/// A sound configuration.
fn read_conf(dict: &Bound<'_, PyDict>) -> PyResult<ShardConf> {
    let conf = ShardConf {
        shard: ShardId { volume: VolumeId(get(dict, "volume_id")?), index: get(dict, "index")? },
        epoch: Epoch(get(dict, "epoch")?),
        rf: get(dict, "rf")?,
        min_write: get(dict, "min_write")?,
        primary: get(dict, "primary")?,
        isr: read_copies(dict, "isr")?,
        learners: read_copies(dict, "learners")?,
        members: read_members(dict, "members")?,
        history_id: get(dict, "history_id")?,
        attach_epoch: get(dict, "attach_epoch")?,
    };
    conf.check().map_err(unsound)?;
    Ok(conf)
}

/// `Vec<u8>` would be taken from bytes as well; numbers are what is meant.
fn read_copies(dict: &Bound<'_, PyDict>, name: &str) -> PyResult<Vec<CopyId>> {
    let numbers: Vec<u64> = get(dict, name)?;
    let copy = |number: &u64| {
        let text = format!("{name} holds {number}, which is no copy");
        CopyId::try_from(*number).map_err(|_| raise(Status::Invalid, &text))
    };
    numbers.iter().map(copy).collect()
}

fn write_conf<'py>(py: Python<'py>, conf: &ShardConf) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("volume_id", conf.shard.volume.0)?;
    out.set_item("index", conf.shard.index)?;
    out.set_item("epoch", conf.epoch.0)?;
    out.set_item("rf", conf.rf)?;
    out.set_item("min_write", conf.min_write)?;
    out.set_item("primary", conf.primary)?;
    out.set_item("isr", PyTuple::new(py, &conf.isr)?)?;
    out.set_item("learners", PyTuple::new(py, &conf.learners)?)?;
    let members = conf.members.iter().map(|member| {
        let entry = PyDict::new(py);
        entry.set_item("copy", member.copy)?;
        entry.set_item("store", member.store)?;
        entry.set_item("incarnation", member.incarnation)?;
        entry.set_item("disk", hex(&member.disk))?;
        entry.set_item("format_uuid", hex(&member.format_uuid))?;
        Ok(entry)
    });
    let members = members.collect::<PyResult<Vec<_>>>()?;
    out.set_item("members", PyTuple::new(py, members)?)?;
    out.set_item("history_id", conf.history_id)?;
    out.set_item("attach_epoch", conf.attach_epoch)?;
    Ok(out)
}

fn read_transition(dict: &Bound<'_, PyDict>) -> PyResult<Transition> {
    let kind: String = get(dict, "kind")?;
    let copy = || get::<CopyId>(dict, "copy");
    let member = || read_member(&get(dict, "member")?);
    Ok(match kind.as_str() {
        "remove" => Transition::Remove { copy: copy()? },
        "promote" => Transition::Promote { copy: copy()? },
        "add_learner" => Transition::AddLearner { member: member()? },
        "admit" => Transition::Admit { copy: copy()?, incarnation: get(dict, "incarnation")? },
        "transfer" => Transition::Transfer { copy: copy()? },
        "reopen" => {
            let present = read_members(dict, "present")?;
            Transition::Reopen { primary: get(dict, "primary")?, present }
        }
        "force_accept" => {
            let history_id = get(dict, "history_id")?;
            Transition::ForceAccept { member: member()?, history_id }
        }
        "cancel" => Transition::Cancel { copy: copy()? },
        "attach" => Transition::Attach { attach_epoch: get(dict, "attach_epoch")? },
        "properties" => {
            Transition::Properties { rf: get(dict, "rf")?, min_write: get(dict, "min_write")? }
        }
        other => return Err(raise(Status::Invalid, &format!("{other:?} is no transition"))),
    })
}

fn read_facts(dict: &Bound<'_, PyDict>) -> PyResult<Facts> {
    let proposer: Bound<'_, PyDict> = get(dict, "proposer")?;
    let kind: String = get(&proposer, "kind")?;
    let proposer = match kind.as_str() {
        "conductor" => Proposer::Conductor,
        "human" => Proposer::Human,
        "replica" => Proposer::Replica {
            copy: get(&proposer, "copy")?,
            incarnation: get(&proposer, "incarnation")?,
        },
        other => return Err(raise(Status::Invalid, &format!("{other:?} is no proposer"))),
    };
    let registered = get::<Bound<'_, PyDict>>(dict, "registered")?.iter().map(|(store, found)| {
        let found = found.cast::<PyDict>()?;
        let registration = Registration {
            incarnation: get(found, "incarnation")?,
            is_reachable: get(found, "is_reachable")?,
            has_good_journal: get(found, "has_good_journal")?,
        };
        Ok((store.extract()?, registration))
    });
    let complete = get::<Bound<'_, PyDict>>(dict, "complete")?.iter().map(|(copy, lsn)| {
        let (epoch, seq): (u64, u64) = lsn.extract()?;
        Ok((copy.extract()?, Lsn { epoch: Epoch(epoch), seq: Seq(seq) }))
    });
    Ok(Facts {
        proposer,
        registered: registered.collect::<PyResult<_>>()?,
        complete: complete.collect::<PyResult<_>>()?,
        ended: get(dict, "ended")?,
    })
}
