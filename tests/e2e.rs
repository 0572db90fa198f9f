//! A node as its users see it: `sdsd dev` as a process, and the clients of others against it.
//!
//! Needs qemu-utils, libnbd-bin, fio, python3, etcd-server and etcd-client (`tools/test` installs them); a
//! test whose tool is missing fails and says so. Disks are small files in `/dev/shm` or
//! `target/tmp`.

#![allow(clippy::disallowed_methods, reason = "these tests live in real time")]

#[path = "e2e/clients.rs"]
mod clients;
#[path = "e2e/cluster.rs"]
mod cluster;
#[path = "e2e/control.rs"]
mod control;
#[path = "e2e/crash.rs"]
mod crash;
#[path = "e2e/daemon.rs"]
mod daemon;
#[path = "e2e/etcd.rs"]
mod etcd;
#[path = "etcd_support/mod.rs"]
mod etcd_support;
#[path = "e2e/faults.rs"]
mod faults;
#[path = "e2e/guest.rs"]
mod guest;
#[path = "nbd_threaded/identity.rs"]
mod identity;
#[path = "e2e/partitions.rs"]
mod partitions;
#[path = "e2e/slow.rs"]
mod slow;
#[path = "e2e/space.rs"]
mod space;
#[path = "e2e/store.rs"]
mod store;
#[path = "e2e/strangers.rs"]
mod strangers;
#[path = "e2e/support.rs"]
mod support;
#[path = "e2e/survive.rs"]
mod survive;
