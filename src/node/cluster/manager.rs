//! The manager: gives every volume a node that runs.
//!
//! One node holds the manager's key by its lease. It places volumes that have no place, or whose node
//! is gone: it has no lease any more, and does not answer this node either. A node that answers but has
//! lost the store goes on serving, so its volumes are left alone. Nobody is judged until the store has
//! answered for two leases on end.
//!
//! Volumes leave a node that an operator drains, and spread over the nodes, a few at a time.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{Cluster, Node};
use crate::id::VolumeId;
use crate::meta::members::{MemberState, PlaceRecord};
use crate::meta::record::VolumeState;

/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long an order is waited for before it is given again.
const ORDER_PATIENCE: Duration = Duration::from_secs(3);
/// How long the store may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Volumes that move at once.
const MOVES_MAX: usize = 4;
/// Volumes that a node may have more than another one for ever.
const IMBALANCE_MAX: usize = 1;
/// How long a node has to run before volumes move to it for balance.
const SETTLE: Duration = Duration::from_secs(5);

/// An order of the manager.
#[derive(Debug, PartialEq, Eq)]
struct Order {
    volume: VolumeId,
    place: PlaceRecord,
    revision: Option<u64>,
}

/// A volume, as the manager sees it.
struct Seat {
    volume: VolumeId,
    place: Option<(PlaceRecord, u64)>,
}

/// What is to be done. `nodes`: those that heads may be placed on; `up`: whether a node is to be
/// counted on.
fn plan(seats: &[Seat], nodes: &[String], up: impl Fn(&str) -> bool, balance: bool) -> Vec<Order> {
    let mut load: BTreeMap<&str, usize> = nodes.iter().map(|name| (name.as_str(), 0)).collect();
    let mut moving = 0;
    for (place, _) in seats.iter().filter_map(|seat| seat.place.as_ref()) {
        moving += usize::from(place.next.is_some());
        let heading = place.next.as_ref().unwrap_or(&place.node);
        if let Some(count) = load.get_mut(heading.as_str()) {
            *count += 1;
        }
    }
    let mut orders = Vec::new();
    let least = |load: &BTreeMap<&str, usize>| {
        load.iter().min_by_key(|(_, count)| **count).map(|(name, _)| (*name).to_owned())
    };
    for seat in seats {
        let lost = seat.place.as_ref().is_none_or(|(place, _)| !up(&place.node));
        let astray = seat.place.as_ref().is_some_and(|(place, _)| {
            let possible = |next: &str| load.contains_key(next) || (place.at_client && up(next));
            place.next.as_ref().is_some_and(|next| !possible(next))
        });
        let target = if lost {
            // Where it was to go, if that is possible: it is counted there.
            let next = seat.place.as_ref().and_then(|(place, _)| place.next.clone());
            let known = next.filter(|next| load.contains_key(next.as_str()));
            let Some(node) = known.clone().or_else(|| least(&load)) else { break };
            if known.is_none() {
                *load.get_mut(node.as_str()).expect("chosen from it") += 1;
            }
            PlaceRecord::on(node)
        } else if astray {
            let (place, _) = seat.place.as_ref().expect("it goes somewhere");
            PlaceRecord::on(&place.node)
        } else {
            continue;
        };
        let revision = seat.place.as_ref().map(|(_, revision)| *revision);
        orders.push(Order { volume: seat.volume, place: target, revision });
    }
    if !orders.is_empty() {
        return orders;
    }
    for seat in seats {
        let movable = |place: &PlaceRecord| place.next.is_none() && !place.at_client;
        let Some((place, revision)) = seat.place.as_ref().filter(|(place, _)| movable(place))
        else {
            continue;
        };
        if moving >= MOVES_MAX {
            break;
        }
        let Some(next) = least(&load) else { break };
        let own = load.get(place.node.as_str()).copied();
        let there = load[next.as_str()];
        // A node that is drained is not among those that volumes may be on.
        if own.is_some_and(|own| !balance || own <= there + IMBALANCE_MAX) {
            continue;
        }
        if let Some(count) = load.get_mut(place.node.as_str()) {
            *count -= 1;
        }
        *load.get_mut(next.as_str()).expect("chosen from it") += 1;
        moving += 1;
        orders.push(Order {
            volume: seat.volume,
            place: PlaceRecord { next: Some(next), ..PlaceRecord::on(&place.node) },
            revision: Some(*revision),
        });
    }
    orders
}

impl Node {
    /// Whether this node is the manager.
    pub(in crate::node) fn is_manager(&self) -> bool {
        let Some(cluster) = self.cluster.as_ref() else { return true };
        cluster.view.borrow().manager() == Some(self.options.name.as_str())
    }

    /// Stands for manager, and does its work while it is.
    pub(super) async fn manage(self: Rc<Self>) {
        let Some(cluster) = self.cluster.as_ref() else { return };
        let mut nodes_since = (Vec::new(), Instant::now());
        while !self.stopping.get() {
            let changed = cluster.keys.changed.notified();
            drop(timeout(LOOK_EVERY, changed).await);
            if cluster.keys.answers_for().is_none() {
                cluster.judges_from.set(Instant::now() + cluster.options.lease * 2);
                continue;
            }
            let nobody = cluster.view.borrow().manager().is_none();
            if nobody
                && let Some(lease) = cluster.lease.get()
                && let Ok(Ok(true)) =
                    timeout(PATIENCE, self.schema.stand_for_manager(&self.options.name, lease))
                        .await
            {
                tracing::info!("this node is the manager");
                continue;
            }
            if !self.is_manager() || cluster.lease.get().is_none() {
                continue;
            }
            if Instant::now() < cluster.judges_from.get() {
                continue;
            }
            let nodes = cluster.eligible();
            if nodes != nodes_since.0 {
                nodes_since = (nodes.clone(), Instant::now());
            }
            let settled = nodes_since.1.elapsed() >= SETTLE;
            let orders = plan(&cluster.seats(), &nodes, |node| cluster.is_up(node), settled);
            self.give(cluster, orders).await;
        }
    }

    async fn give(&self, cluster: &Cluster, orders: Vec<Order>) {
        let ordered = &cluster.ordered;
        ordered.borrow_mut().retain(|_, (_, since)| since.elapsed() < ORDER_PATIENCE);
        for Order { volume, place, revision } in orders {
            // What was ordered for this very place may not be seen here yet.
            if ordered.borrow().get(&volume).is_some_and(|(of, _)| *of == revision) {
                continue;
            }
            ordered.borrow_mut().insert(volume, (revision, Instant::now()));
            let (to, next) = (place.node.clone(), place.next.clone());
            match timeout(PATIENCE, self.schema.set_place(volume, &place, revision)).await {
                Ok(Ok(true)) => tracing::info!(%volume, to, next, "volume placed"),
                // It was placed, or deleted, meanwhile.
                Ok(Ok(false)) => drop(ordered.borrow_mut().remove(&volume)),
                Ok(Err(error)) => tracing::warn!(%volume, to, %error, "volume not placed"),
                Err(_) => {
                    tracing::warn!(%volume, to, "the store does not answer");
                    sleep(LOOK_EVERY).await;
                    return;
                }
            }
        }
    }
}

impl Cluster {
    /// The nodes that heads may be placed on. One without disks gets only those of its clients, unless there are
    /// no others.
    pub(super) fn eligible(&self) -> Vec<String> {
        let running = self.running();
        let view = self.view.borrow();
        let with_disks = |name: &&String| view.disks.iter().any(|(_, disk, _)| disk.node == **name);
        let storing: Vec<String> = running.iter().filter(with_disks).cloned().collect();
        if storing.is_empty() { running } else { storing }
    }

    /// The nodes that run, are reached, and are not drained.
    pub(super) fn running(&self) -> Vec<String> {
        let view = self.view.borrow();
        let links = self.links.borrow();
        let running = view.members.iter().filter(|(name, member, _)| {
            let reached = *name == self.own.name
                || links.get(*name).is_some_and(|link| super::far::is_up(&link.peer));
            member.state == MemberState::Active && view.alive.get(name).is_some() && reached
        });
        running.map(|(name, ..)| name.to_owned()).collect()
    }

    fn seats(&self) -> Vec<Seat> {
        let view = self.view.borrow();
        let active = view.volumes.iter().filter(|(_, v, _)| v.state == VolumeState::Active);
        let seats = active.map(|(key, record, _)| Seat {
            volume: record.id,
            place: view.places.get(key).map(|(place, revision)| (place.clone(), revision)),
        });
        seats.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(number: u8, node: &str, next: Option<&str>) -> Seat {
        let place = PlaceRecord { next: next.map(str::to_owned), ..PlaceRecord::on(node) };
        let place = (!node.is_empty()).then_some((place, 7));
        Seat { volume: VolumeId::from_bytes([number; 16]), place }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn planned(seats: &[Seat], nodes: &[&str], up: &[&str]) -> Vec<(u8, String, Option<String>)> {
        let orders = plan(seats, &names(nodes), |node| up.contains(&node), true);
        let number = |order: &Order| order.volume.to_bytes()[0];
        orders.iter().map(|o| (number(o), o.place.node.clone(), o.place.next.clone())).collect()
    }

    #[test]
    fn volumes_of_a_node_that_is_gone_are_spread() {
        let seats = [seat(1, "a", None), seat(2, "a", None), seat(3, "b", None), seat(4, "", None)];
        let orders = planned(&seats, &["b", "c"], &["b", "c"]);
        let placed: Vec<_> = orders.iter().map(|(n, node, _)| (*n, node.as_str())).collect();
        assert_eq!(placed, [(1, "c"), (2, "b"), (4, "c")]);
    }

    #[test]
    fn a_node_that_answers_keeps_its_volumes() {
        // It has no lease, so it is not eligible; but it is up.
        let seats = [seat(1, "a", None), seat(2, "b", None)];
        let orders = plan(&seats, &names(&["b"]), |_| true, false);
        // It is as if it were drained: its volumes go when it can hand them over.
        assert!(orders.iter().all(|order| order.place.node == "a"));
    }

    #[test]
    fn volumes_leave_a_node_in_order() {
        let seats = [seat(1, "a", None), seat(2, "a", Some("b"))];
        let orders = planned(&seats, &["b", "c"], &["a", "b", "c"]);
        assert_eq!(orders, [(1, "a".into(), Some("c".into()))]);
        // Where it was to go is gone: it stays, and is sent elsewhere next.
        let orders = planned(&seats, &["c"], &["a", "c"]);
        assert_eq!(orders, [(2, "a".into(), None)]);
        // The node itself is gone: it goes where it was to go.
        let orders = planned(&seats[1..], &["b", "c"], &["b", "c"]);
        assert_eq!(orders, [(2, "b".into(), None)]);
    }

    #[test]
    fn balance_moves_no_more_than_it_must() {
        let seats: Vec<Seat> = (0..6).map(|n| seat(n, "a", None)).collect();
        let orders = planned(&seats, &["a", "b", "c"], &["a", "b", "c"]);
        assert_eq!(orders.len(), 4);
        let even: Vec<Seat> = ["a", "a", "b", "b", "c"]
            .iter()
            .zip(0..)
            .map(|(node, number)| seat(number, node, None))
            .collect();
        assert!(planned(&even, &["a", "b", "c"], &["a", "b", "c"]).is_empty());
    }

    #[test]
    fn a_volume_stays_where_its_client_is() {
        let at_client = |mut seat: Seat| {
            seat.place.as_mut().expect("it has a place").0.at_client = true;
            seat
        };
        // Node g stores nothing, so nothing is placed there but for clients.
        let seats = [at_client(seat(1, "g", None)), at_client(seat(2, "a", Some("g")))];
        assert!(planned(&seats, &["a", "b"], &["a", "b", "g"]).is_empty());
        // When it is gone, its volumes go elsewhere.
        let orders = planned(&seats, &["a", "b"], &["a", "b"]);
        assert_eq!(orders, [(1, "a".into(), None), (2, "a".into(), None)]);
        // When the client left, it is like others.
        let orders = planned(&[seat(1, "g", None)], &["a", "b"], &["a", "b", "g"]);
        assert_eq!(orders, [(1, "g".into(), Some("a".into()))]);
    }

    #[test]
    fn nobody_is_left_to_take_them() {
        assert!(planned(&[seat(1, "a", None)], &[], &[]).is_empty());
    }
}
