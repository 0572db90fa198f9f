//! A volume is placed elsewhere while its head lives, and does not know.
//!
//! What the store says of places is advice: whoever believes that a node is gone may be wrong. So a head that
//! cannot hear of it, or is held, meets one that takes its volume over at once; its clients go on
//! ([`super::duel`]).
//!
//! A take-over waits long for a disk that does not answer, so that leases run out meanwhile. So in half of the
//! cases the next node has lost the connection to the old head's before.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::context::{Context, Rest};
use super::duel::Duel;
use super::nemesis::{Busy, millis};
use crate::meta::members::{PlaceRecord, place_key};
use crate::meta::schema::Schema;
use crate::sim::device::SimDevice;

/// How long a take-over may last.
const PATIENCE: Duration = Duration::from_secs(5);

/// How the head is kept from hearing of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deaf {
    /// From the store alone.
    Store,
    /// Answers of disks come late, by up to more than a lease.
    Late,
    /// Nothing reaches it: answers of disks are held back.
    Inward,
    /// It is cut off from all others.
    All,
    /// It is held.
    Held,
}

impl Deaf {
    const EACH: [Self; 7] =
        [Self::Store, Self::Store, Self::Late, Self::Late, Self::Inward, Self::All, Self::Held];

    fn told(self) -> &'static str {
        match self {
            Self::Store => "a head without the store is replaced",
            Self::Late => "a head that gets answers late is replaced",
            Self::Inward => "a head that nothing reaches is replaced",
            Self::All => "a head that is cut off is replaced",
            Self::Held => "a head that is held is replaced",
        }
    }
}

/// Places a volume on another node.
pub(super) fn strike(context: &Rc<Context>) {
    let volumes = context.volumes();
    let Some(volume) = volumes.get(context.pick(volumes.len())).cloned() else { return };
    let heads = context.heads_of(volume.id);
    let Some((index, head)) = heads.last().cloned() else { return };
    let mut others = context.members();
    others.retain(|other| *other != index && context.host(*other).node().is_some());
    let Some(next) = others.get(context.pick(others.len())).copied() else { return };
    let Some(busy) = Busy::claim(context, index) else { return };
    // Mostly nothing else happens to the next one.
    let spared = context.env.chance(3, 4).then(|| Busy::claim(context, next));
    let mut deaf = Deaf::EACH[context.pick(Deaf::EACH.len())];
    if deaf == Deaf::Late && carriers(context, [index, next]) <= usize::from(volume.scheme.parity) {
        deaf = Deaf::Store;
    }
    context.cover_noted(deaf.told());
    let hosts = (busy.host(), context.host(next));
    context.note(&format!("{} from {} to {}", volume.name, hosts.0.name, hosts.1.name));
    let duel = Duel::new(context.clone(), volume, hosts, head.authority.epoch);
    context.spawn(async move {
        Usurped { duel, deaf, busy }.run().await;
        drop(spared);
    });
}

/// How many machines other than these run and have disks: an append that one's own disk answers at once goes
/// on elsewhere when the other answers are late.
fn carriers(context: &Context, but: [usize; 2]) -> usize {
    let others = context.members().into_iter().filter(|index| !but.contains(index));
    let nodes = others.filter_map(|index| context.host(index).node());
    nodes.filter(|node| !node.own_disks().is_empty()).count()
}

/// A head that is being replaced.
struct Usurped {
    duel: Duel,
    deaf: Deaf,
    busy: Busy,
}

impl Usurped {
    async fn run(self) {
        let (context, own) = (&self.duel.context, self.busy.host());
        // What others write tells a head that it was replaced.
        let rest = context.env.chance(2, 3).then(|| Rest::of(&self.duel.volume));
        self.part().await;
        self.duel.prepare().await;
        let delay = self.deafen();
        let feeds = self.deaf == Deaf::Late || context.env.chance(1, 4);
        let usurp = async {
            sleep(delay + millis(context, 20)).await;
            own.pause(self.deaf == Deaf::Held);
            self.place().await;
            tokio::join!(self.hear_again(), self.replaced());
        };
        tokio::select! {
            biased;
            () = usurp => {}
            () = self.duel.run(feeds) => {}
        }
        drop(rest);
        sleep(millis(context, 1500)).await;
        own.store.set_unavailable(false);
    }

    fn others(&self) -> Vec<String> {
        let hosts = self.duel.context.town.hosts();
        let names = hosts.iter().map(|host| host.name.clone());
        names.filter(|name| *name != self.duel.old.name).collect()
    }

    /// The next node loses its connection to the old head's, which may lose its own disks: so nothing tells
    /// the old head early that it is fenced.
    async fn part(&self) {
        let (context, net) = (&self.duel.context, &self.duel.context.town.net);
        let late = self.deaf == Deaf::Late;
        if late {
            self.duel.old.devices.all().iter().for_each(SimDevice::vanish);
        }
        if late || context.env.chance(1, 2) {
            let (old, next) = (&self.duel.old.name, &self.duel.next.name);
            net.cut(old, next);
            net.tear(old, next, None);
            sleep(Duration::from_millis(300 + context.env.random_below(300))).await;
        }
    }

    /// Has the head hear nothing any more, or late; how much later.
    fn deafen(&self) -> Duration {
        let (context, own) = (&self.duel.context, &self.duel.old.name);
        let net = &context.town.net;
        self.duel.old.store.set_unavailable(true);
        let lease = context.town.config.head.lease;
        // Probes are given up after a lease; appends are not.
        let late = lease * (7 + u32::try_from(context.pick(9)).unwrap_or(0)) / 10;
        for other in self.others() {
            match self.deaf {
                Deaf::Late if other != self.duel.next.name => net.delay_way(&other, own, late),
                Deaf::Inward => net.cut_way(&other, own),
                Deaf::All => net.cut(&other, own),
                _ => {}
            }
        }
        if self.deaf == Deaf::Late { late } else { Duration::ZERO }
    }

    /// The head hears again, after a while.
    async fn hear_again(&self) {
        let (context, own) = (&self.duel.context, &self.duel.old);
        sleep(Duration::from_millis(100 + context.env.random_below(4000))).await;
        own.pause(false);
        for other in self.others() {
            context.town.net.mend_way(&other, &own.name);
            context.town.net.mend_way(&own.name, &other);
            context.town.net.delay_way(&other, &own.name, Duration::ZERO);
        }
        own.devices.all().iter().for_each(SimDevice::end_faults);
    }

    /// Returns when the old head's lease has surely run out after the new one serves.
    async fn replaced(&self) {
        let context = &self.duel.context;
        if timeout(PATIENCE, self.duel.replaced()).await.is_ok() {
            context.cover("a replaced head has a successor");
            sleep(context.town.config.head.lease.mul_f64(1.3)).await;
        }
    }

    async fn place(&self) {
        let (context, volume) = (&self.duel.context, self.duel.volume.id);
        let schema = Schema::new(Rc::new(context.town.store.client(Rc::default())));
        let revision = context.town.store.peek(&place_key(volume)).map(|found| found.revision);
        let place = PlaceRecord::on(&self.duel.next.name);
        let placed = schema.set_place(volume, &place, revision).await;
        context.note(&format!("placed: {:?}", placed.is_ok()));
    }
}
