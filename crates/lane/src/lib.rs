//! One lane: one core's share of one disk (docs/internals/lane.md).
#![forbid(unsafe_code)]
