//! Disks are added in the end of a run: shards must move there, and moving must come to an end.
//!
//! Faults are over, nobody writes. From then on no more moves than there are slots in use, and then nothing does.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::nemesis::reopen;
use super::run::Context;
use super::world::Running;

/// How long moving may take, and how long nothing must move until it counts as over.
const PATIENCE: u32 = 600;
const QUIET: u32 = 60;
const LOOK: Duration = Duration::from_millis(250);

/// Adds the spare disks and waits until nothing moves.
///
/// # Errors
/// What is not as it should be, in words.
pub(super) async fn spell(context: &Context, heads: &[Rc<Running>]) -> Result<(), String> {
    *context.world.waiting.borrow_mut() = "the end of balance".into();
    while let Some(index) = context.world.add_spare() {
        reopen(context, index).await;
        context.cover_noted("a disk is added in the end");
    }
    let count = || heads.iter().map(|r| r.head.stats.balanced_shards.get()).sum::<u64>();
    let before = count();
    let (mut last, mut quiet) = (before, 0);
    for _ in 0..PATIENCE {
        sleep(LOOK).await;
        quiet = if count() == last { quiet + 1 } else { 0 };
        last = count();
        if quiet == QUIET {
            break;
        }
    }
    let moved = last - before;
    let used: Vec<(u32, u32)> = fills(context);
    let all: u64 = used.iter().map(|(used, _)| u64::from(*used)).sum();
    context.note(&format!("{moved} shards moved, slots in use are {used:?}"));
    if moved > 0 {
        context.cover("shards move to a disk that was added");
    }
    if quiet < QUIET || moved > all {
        return Err(format!("balance does not end: {moved} shards moved, {used:?} slots in use"));
    }
    Ok(())
}

/// Slots in use of each disk that is there, and all of them.
fn fills(context: &Context) -> Vec<(u32, u32)> {
    let present = super::bend::present(context).into_iter();
    let info = present.filter_map(|index| context.world.disk(index)?.info().ok());
    info.map(|info| (info.slots - info.slots_free, info.slots)).collect()
}
