//! A volume shrinks and grows while clients write, faults strike and heads change.
//!
//! Plays the part of the node (`src/node/resize.rs`): the size is stored first, then what lies beyond
//! is cut off by whichever head serves, as often as it takes; only then does the volume grow. To the
//! oracle a cut is a write of zeroes to all that lies beyond.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::oracle::{Outcome, SECTOR};
use super::run::{Context, Pending};
use super::world::{Running, Volume};
use crate::id::BLOCK_BYTES;

/// Pause before a cut that failed is tried again.
const RETRY: Duration = Duration::from_millis(50);

/// Marks that a volume is being cut as long as this lives.
struct Cutting<'a>(&'a Volume);

impl Drop for Cutting<'_> {
    fn drop(&mut self) {
        self.0.cutting.set(false);
    }
}

/// Changes the size of one of the volumes.
pub(super) fn resize(context: &Rc<Context>) {
    let heads = context.newest_heads();
    let picked = context.env.random_below(heads.len().max(1) as u64);
    let Some(running) = usize::try_from(picked).ok().and_then(|index| heads.get(index)) else {
        return;
    };
    let volume = &running.volume;
    let (now, most) = (volume.bytes.get(), volume.bytes_max);
    if !running.head.is_serving() {
        return;
    }
    if context.env.chance(if now < most { 1 } else { 3 }, 3) && now > BLOCK_BYTES {
        let size = BLOCK_BYTES * (1 + context.env.random_below(now / BLOCK_BYTES - 1));
        context.cover_noted("a volume shrinks");
        set_size(running, size);
        volume.cut_from.set(Some(volume.cut_from.get().unwrap_or(now)));
        go_on_cutting(context, volume);
    } else if now < most && volume.cut_from.get().is_none() {
        let more = (most - now) / BLOCK_BYTES;
        let size = now + BLOCK_BYTES * (1 + context.env.random_below(more));
        context.cover_noted("a volume grows");
        set_size(running, size);
    }
}

fn set_size(running: &Running, size: u64) {
    running.volume.bytes.set(size);
    running.volume.resizes.set(running.volume.resizes.get() + 1);
    running.head.resize(size);
}

/// Has a volume cut off what it lost, if that is not done.
pub(super) fn go_on_cutting(context: &Rc<Context>, volume: &Rc<Volume>) {
    if volume.cut_from.get().is_some() && !volume.cutting.get() {
        let (context, volume) = (context.clone(), volume.clone());
        context.clone().spawn(async move { cut_until_done(&context, &volume).await });
    }
}

async fn cut_until_done(context: &Context, volume: &Rc<Volume>) {
    if volume.cutting.replace(true) {
        return;
    }
    let _cutting = Cutting(volume);
    while !context.stop.get() {
        let newest = context.newest_heads().into_iter().find(|r| Rc::ptr_eq(&r.volume, volume));
        if let Some(running) = newest
            && running.head.is_serving()
            && cut(context, &running).await
        {
            return;
        }
        sleep(RETRY).await;
    }
}

/// Cuts off what lies beyond the end. Tells whether there is nothing any more.
async fn cut(context: &Context, running: &Running) -> bool {
    let volume = &running.volume;
    let (size, Some(from)) = (volume.bytes.get(), volume.cut_from.get()) else { return true };
    let (first, end) = (size / SECTOR as u64, from / SECTOR as u64);
    let write = volume.oracle.borrow_mut().begin(first, end - first, true);
    let pending = Pending::new(volume, write);
    let result = running.head.cut_off(from).await;
    context.note(&format!("cut {size} from {from}: {result:?}"));
    if let Err(error) = result {
        context.cover("a cut failed");
        pending.end(Outcome::InDoubt);
        tracing::debug!(%error, "a cut failed");
        return false;
    }
    pending.end(Outcome::Acknowledged);
    if volume.bytes.get() != size {
        return false;
    }
    context.cover_noted("what was cut off is gone");
    volume.cut_from.set(None);
    true
}

/// In the end every cut is done, and the volume has its largest size again.
pub(super) async fn restore(context: &Context, running: &Running) -> Result<(), String> {
    let volume = &running.volume;
    for tries in 0.. {
        if cut(context, running).await {
            break;
        }
        if tries == 20 || running.head.stopped().is_some() {
            return Err(format!("what was cut off stays: {:?}", running.head.stopped()));
        }
        sleep(RETRY * 10).await;
    }
    if volume.bytes.get() < volume.bytes_max {
        context.cover_noted("a volume is as large as it was before it shrank");
        set_size(running, volume.bytes_max);
    }
    Ok(())
}
