//! The client end of a shard.
