//! Disks: append-only shards in slots of a block device.

pub mod device;
pub mod uring;
