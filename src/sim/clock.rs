//! Virtual time: a runtime whose clock moves only when nothing else is to be done.
//!
//! Knows nothing of the rest of the simulation, so that tests which are built without it can take
//! this file as it is.

use tokio::runtime::Builder;
use tokio::task::LocalSet;

/// Runs a future to its end on this thread, in virtual time. It may spawn local tasks; those that
/// are left when it ends are dropped.
pub fn simulate<T>(future: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime needs nothing from the system");
    LocalSet::new().block_on(&runtime, future)
}
