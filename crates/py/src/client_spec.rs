//! The dictionary that describes a volume, as `Gateway` and `Volume` take it.

use crate::errors;
use node::VolumeSpec;
use node::spec::{ShardSpec, volume_spec};
use proto::Status;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

fn field<'py>(dict: &Bound<'py, PyDict>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    let missing = || errors::raise(Status::Invalid, &format!("the description has no {name:?}"));
    dict.get_item(name)?.ok_or_else(missing)
}

fn shard(dict: &Bound<'_, PyDict>) -> PyResult<ShardSpec> {
    let has_lane = dict.contains("lane")?;
    Ok(ShardSpec {
        index: field(dict, "index")?.extract()?,
        epoch: field(dict, "epoch")?.extract()?,
        address: field(dict, "address")?.extract()?,
        // One lane per store is the common case.
        lane: if has_lane { field(dict, "lane")?.extract()? } else { 0 },
    })
}

/// Read and check a description.
pub fn read(dict: &Bound<'_, PyDict>) -> PyResult<VolumeSpec> {
    let shards: Vec<Bound<'_, PyDict>> = field(dict, "shards")?.extract()?;
    let shards = shards.iter().map(shard).collect::<PyResult<Vec<_>>>()?;
    let volume_id: u64 = field(dict, "volume_id")?.extract()?;
    let sizes: (u64, u64) =
        (field(dict, "size_bytes")?.extract()?, field(dict, "shard_size_bytes")?.extract()?);
    let attach_epoch: u64 = field(dict, "attach_epoch")?.extract()?;
    let ticket: Vec<u8> = field(dict, "ticket")?.cast::<PyBytes>()?.as_bytes().to_vec();
    // Names are looked up, which may take a while.
    let spec = dict.py().detach(|| volume_spec(volume_id, sizes, attach_epoch, &ticket, &shards));
    spec.map_err(|problem| errors::client(&problem))
}
