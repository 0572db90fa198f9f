//! Which node is to serve each volume: what the manager orders.
//!
//! A volume without a node that runs gets the one with the fewest. When there is none of those, volumes leave nodes that are
//! drained, and spread, a few at a time. Pure: the same view gives the same orders.

use std::collections::BTreeMap;

use crate::id::VolumeId;
use crate::meta::members::PlaceRecord;

/// Volumes that move at once.
const MOVES_MAX: usize = 4;
/// Volumes that a node may have more than another one for ever.
const IMBALANCE_MAX: usize = 1;

/// An order of the manager.
#[derive(Debug, PartialEq, Eq)]
pub struct Order {
    /// The volume.
    pub volume: VolumeId,
    /// Where it is to be.
    pub place: PlaceRecord,
    /// Revision of the place that this replaces; none if it has none.
    pub revision: Option<u64>,
}

/// A volume, as the manager sees it.
pub struct Seat {
    /// The volume.
    pub volume: VolumeId,
    /// Its place, if it has one, with the revision.
    pub place: Option<(PlaceRecord, u64)>,
}

/// What is to be done. `nodes`: those that heads may be placed on; `up`: whether a node is to be
/// counted on; `balance`: whether volumes move to nodes that have fewer.
pub fn plan(
    seats: &[Seat],
    nodes: &[String],
    up: impl Fn(&str) -> bool,
    balance: bool,
) -> Vec<Order> {
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
