//! Open files of the process: raised as far as the system allows, and shared out so that clients
//! never take those that disks need.

use crate::config::DISKS_MAX;
use crate::limits::CONNECTIONS_MAX;

/// Descriptors that connections leave alone: disks (open and opened anew at the same time),
/// listeners, the store, the admin API, the runtime.
const RESERVED: u64 = 2 * DISKS_MAX as u64;
/// Connections that are served even where the reserve does not fit.
const CONNECTIONS_MIN: u64 = 16;

/// Raises the soft limit of open files to the hard one; the limit in force.
pub(super) fn raise_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is valid for the length of the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "the limit of open files is not known");
        return 0;
    }
    let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
    // SAFETY: as above.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0 {
        return raised.rlim_cur;
    }
    let error = std::io::Error::last_os_error();
    tracing::warn!(%error, limit = limit.rlim_cur, "the limit of open files cannot be raised");
    limit.rlim_cur
}

/// How many connections each of several servers of a process with this limit of open files may
/// have.
pub(super) fn connections_max(limit: u64, servers: u64) -> usize {
    let connections = limit.saturating_sub(RESERVED).max(CONNECTIONS_MIN.min(limit / 2)) / servers;
    let connections = usize::try_from(connections).unwrap_or(usize::MAX).min(CONNECTIONS_MAX);
    if connections < CONNECTIONS_MAX {
        tracing::warn!(
            limit,
            connections,
            "the limit of open files allows fewer connections than {CONNECTIONS_MAX}: raise it \
             (ulimit -n, LimitNOFILE=)"
        );
    }
    connections
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_keep_their_share() {
        assert_eq!(connections_max(1 << 20, 2), CONNECTIONS_MAX);
        assert_eq!(connections_max(1024, 1), 512);
        assert_eq!(connections_max(1024, 2), 256);
        assert_eq!(connections_max(256, 1), 16);
        assert_eq!(connections_max(20, 1), 10);
        assert!(raise_limit() > 0);
    }
}
