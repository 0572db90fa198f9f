//! A volume is placed elsewhere while its head lives, and does not know.
//!
//! What the store says of places is advice: whoever believes that a node is gone may be wrong. So a head that
//! cannot hear of it, or is held, meets one that takes its volume over at once; its clients go on.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::context::Context;
use super::nemesis::{Busy, millis};
use crate::meta::members::{PlaceRecord, place_key};
use crate::meta::schema::Schema;

/// How the head is kept from hearing of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deaf {
    /// From the store alone.
    Store,
    /// Nothing reaches it: answers of disks come late.
    Inward,
    /// It is cut off from all others.
    All,
    /// It is held.
    Held,
}

/// Places a volume on another node.
pub(super) fn strike(context: &Rc<Context>) {
    let volumes = context.volumes();
    let Some(volume) = volumes.get(context.pick(volumes.len())).cloned() else { return };
    let heads = context.heads_of(volume.id);
    let Some((index, _)) = heads.last().cloned() else { return };
    let mut others = context.members();
    others.retain(|other| *other != index && context.host(*other).node().is_some());
    let Some(next) = others.get(context.pick(others.len())).copied() else { return };
    let Some(busy) = Busy::claim(context, index) else { return };
    let deaf = [Deaf::Store, Deaf::Inward, Deaf::All, Deaf::Held][context.pick(4)];
    context.cover_noted(match deaf {
        Deaf::Store => "a head without the store is replaced",
        Deaf::Inward => "a head that nothing reaches is replaced",
        Deaf::All => "a head that is cut off is replaced",
        Deaf::Held => "a head that is held is replaced",
    });
    let task = context.clone();
    context.spawn(async move {
        let context = task;
        let (own, net) = (busy.host(), &context.town.net);
        context.note(&format!("{} from {} to {}", volume.name, own.name, context.host(next).name));
        own.store.set_unavailable(true);
        let names = context.town.hosts().iter().map(|host| host.name.clone()).collect::<Vec<_>>();
        for name in names.iter().filter(|name| **name != own.name) {
            if matches!(deaf, Deaf::Inward | Deaf::All) {
                net.cut_way(name, &own.name);
            }
            if deaf == Deaf::All {
                net.cut_way(&own.name, name);
            }
        }
        own.pause(deaf == Deaf::Held);
        sleep(millis(&context, 20)).await;
        place(&context, &volume.id, next).await;
        sleep(Duration::from_millis(100 + context.env.random_below(4000))).await;
        own.pause(false);
        for name in names.iter().filter(|name| **name != own.name) {
            net.mend_way(name, &own.name);
            net.mend_way(&own.name, name);
        }
        sleep(millis(&context, 1500)).await;
        own.store.set_unavailable(false);
    });
}

async fn place(context: &Context, volume: &crate::id::VolumeId, next: usize) {
    let schema = Schema::new(Rc::new(context.town.store.client(Rc::default())));
    let revision = context.town.store.peek(&place_key(*volume)).map(|found| found.revision);
    let place = PlaceRecord::on(&context.host(next).name);
    let placed = schema.set_place(*volume, &place, revision).await;
    context.note(&format!("placed: {:?}", placed.is_ok()));
}
