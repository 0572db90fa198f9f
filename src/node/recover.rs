//! Rebuilding a lost metadata store from what the disks mirror.
