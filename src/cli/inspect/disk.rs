//! `sdsctl inspect disk`: identity, layout, tables.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::super::output::{Table, fields, human_bytes, non_empty};
use super::{Subject, as_text, kind_text, scheme_text, state_text};
use crate::disk::format::{ShardRecord, Superblock};
use crate::disk::{Geometry, Inspection, SuperblockCopy, newer_copy};
use crate::id::{ClusterId, DiskId, Epoch, HeadId, SegmentId, VolumeId};
use crate::meta::catalog;
use crate::meta::record::VolumeRecord;
use crate::shard::{Scheme, SegmentKind, ShardState, VolumeFence};
use crate::volume::root::Root;

/// Pages listed one by one for people; JSON has all.
const PAGES_SHOWN: usize = 20;

/// All that `inspect disk` shows.
#[derive(Serialize)]
pub(super) struct DiskReport {
    #[serde(flatten)]
    subject: Subject,
    device_bytes: u64,
    disk: DiskId,
    cluster: ClusterId,
    superblocks: Vec<SuperblockView>,
    layout: Geometry,
    slots: Slots,
    volumes: Vec<VolumeView>,
    catalog: CatalogView,
    /// Table pages that are not alike in both copies.
    pages: Vec<PageView>,
    contradictions: Vec<String>,
    /// With `--slots`.
    #[serde(skip_serializing_if = "Option::is_none")]
    shards: Option<Vec<ShardView>>,
}

#[derive(Serialize)]
struct SuperblockView {
    offset: u64,
    /// Whether this copy is the one that counts.
    counts: bool,
    sequence: Option<u64>,
    formatted: Option<bool>,
    fault: Option<String>,
}

/// Slots by state.
#[derive(Serialize, Default)]
struct Slots {
    free: u32,
    open: u32,
    closed: u32,
    sealed: u32,
    unreadable: u32,
}

#[derive(Serialize)]
struct VolumeView {
    volume: VolumeId,
    name: Option<VolumeName>,
    #[serde(serialize_with = "as_text")]
    epoch: Epoch,
    /// The fence is a tombstone.
    deleted: bool,
    head: HeadId,
    /// Shards of the volume on the disk.
    shards: u32,
    mirror: Option<MirrorView>,
}

#[derive(Serialize)]
struct MirrorView {
    #[serde(serialize_with = "as_text")]
    epoch: Epoch,
    sequence: u64,
    bytes: usize,
    root: Option<Root>,
    fault: Option<String>,
}

#[derive(Serialize, Default)]
struct CatalogView {
    incarnation: u32,
    revision: u64,
    keys: Vec<String>,
    fault: Option<String>,
}

#[derive(Serialize)]
struct PageView {
    table: &'static str,
    page: u32,
    damaged: bool,
    copies: Vec<String>,
}

/// A slot that holds a shard.
#[derive(Serialize)]
pub(super) struct ShardView {
    pub(super) slot: u32,
    pub(super) volume: VolumeId,
    pub(super) segment: SegmentId,
    pub(super) kind: SegmentKind,
    pub(super) scheme: Scheme,
    pub(super) shard: u8,
    pub(super) members: Vec<DiskId>,
    /// Text: it has 64 bits.
    #[serde(serialize_with = "as_text")]
    pub(super) creation: u64,
    #[serde(serialize_with = "as_text")]
    pub(super) epoch: Epoch,
    pub(super) state: ShardState,
    /// Sealed length in blocks.
    pub(super) blocks: Option<u32>,
}

impl ShardView {
    pub(super) fn new(slot: u32, record: &ShardRecord) -> Self {
        let ShardRecord { spec, epoch, state, blocks } = record;
        Self {
            slot,
            volume: spec.volume,
            segment: spec.segment,
            kind: spec.kind,
            scheme: spec.scheme,
            shard: spec.index,
            members: spec.members.clone(),
            creation: spec.creation,
            epoch: *epoch,
            state: *state,
            blocks: (*state == ShardState::Sealed).then_some(*blocks),
        }
    }
}

/// `POOL/NAME` of a volume.
#[derive(Serialize)]
pub(super) struct VolumeName(pub(super) String);

impl VolumeName {
    /// The name that the root mirrored beside the fence tells.
    pub(super) fn of(fence: &VolumeFence) -> Option<Self> {
        let root = Root::decode(&fence.mirror.as_ref()?.data).ok()?;
        let record = VolumeRecord::deserialize(root.description.get("volume")?).ok()?;
        Some(Self(format!("{}/{}", record.pool, record.name)))
    }
}

impl DiskReport {
    pub(super) fn new(
        subject: Subject,
        device_bytes: u64,
        copies: &[SuperblockCopy; 2],
        found: &Inspection,
        with_slots: bool,
    ) -> Self {
        let mut slots = Slots { unreadable: found.slots_unreadable, ..Slots::default() };
        let mut shards: BTreeMap<VolumeId, u32> = BTreeMap::new();
        for (_, record) in &found.slots {
            *shards.entry(record.spec.volume).or_default() += 1;
            *match record.state {
                ShardState::Open => &mut slots.open,
                ShardState::Closed => &mut slots.closed,
                ShardState::Sealed => &mut slots.sealed,
            } += 1;
        }
        let geometry = found.superblock.geometry;
        let known = slots.open + slots.closed + slots.sealed + slots.unreadable;
        slots.free = geometry.slots.saturating_sub(known);
        let count = |volume| shards.get(&volume).copied().unwrap_or(0);
        let mut volumes: Vec<VolumeView> =
            found.volumes.iter().map(|fence| volume_view(fence, count(fence.volume))).collect();
        volumes.sort_by_key(|view| view.volume);
        let list = || found.slots.iter().map(|(slot, record)| ShardView::new(*slot, record));
        Self {
            subject,
            device_bytes,
            disk: found.superblock.disk,
            cluster: found.superblock.cluster,
            superblocks: superblock_views(copies),
            layout: geometry,
            slots,
            volumes,
            catalog: catalog_view(found),
            pages: page_views(found),
            contradictions: found.contradictions.clone(),
            shards: with_slots.then(|| list().collect()),
        }
    }

    /// What is damaged, if anything is. One copy of two is no damage: opening the disk mends it.
    pub(super) fn damage(&self) -> Option<String> {
        let mut damage = self.contradictions.clone();
        let pages = self.pages.iter().filter(|page| page.damaged).count();
        if pages > 0 {
            damage.push(format!("{pages} table pages are unreadable in both copies"));
        }
        damage.extend(self.catalog.fault.clone());
        let mirrors = self.volumes.iter().filter_map(|view| view.mirror.as_ref());
        let faults = mirrors.filter(|mirror| mirror.fault.is_some()).count();
        if faults > 0 {
            damage.push(format!("{faults} root mirrors cannot be decoded"));
        }
        (!damage.is_empty())
            .then(|| format!("{} is damaged: {}", self.subject.path, damage.join("; ")))
    }

    pub(super) fn text(&self) -> String {
        let Geometry { size_bytes, slot_bytes, slots, volumes_max, .. } = self.layout;
        let mut lines = self.subject.lines();
        lines.extend([
            ("disk", self.disk.to_string()),
            ("cluster", self.cluster.to_string()),
            ("device", format!("{} ({} bytes)", human_bytes(self.device_bytes), self.device_bytes)),
            ("formatted", format!("{} ({size_bytes} bytes)", human_bytes(size_bytes))),
        ]);
        for (name, view) in ["superblock 0", "superblock 1"].into_iter().zip(&self.superblocks) {
            lines.push((name, view.text()));
        }
        let states = &self.slots;
        lines.extend([
            ("layout", layout_text(&self.layout)),
            (
                "slots",
                format!(
                    "{slots} of {}: {} free, {} open, {} closed, {} sealed, {} unreadable",
                    human_bytes(slot_bytes),
                    states.free,
                    states.open,
                    states.closed,
                    states.sealed,
                    states.unreadable
                ),
            ),
            ("fences", format!("{} of {volumes_max}", self.volumes.len())),
            ("catalog", self.catalog.text()),
        ]);
        let mut parts = vec![fields(&lines)];
        for page in self.pages.iter().take(PAGES_SHOWN) {
            let what = if page.damaged { "damaged" } else { "copies differ" };
            parts.push(format!(
                "{} table, page {}: {what} (copy 0: {}; copy 1: {})\n",
                page.table, page.page, page.copies[0], page.copies[1]
            ));
        }
        if let more @ 1.. = self.pages.len().saturating_sub(PAGES_SHOWN) {
            parts.push(format!("and {more} more pages; -o json lists all\n"));
        }
        for contradiction in &self.contradictions {
            parts.push(format!("contradiction: {contradiction}\n"));
        }
        if !self.volumes.is_empty() {
            parts.push(format!("\n{}", self.volume_table()));
        }
        if let Some(shards) = &self.shards {
            parts.push(format!("\n{}", shard_table(shards)));
        }
        parts.concat()
    }

    fn volume_table(&self) -> String {
        let mut table =
            Table::new(&["VOLUME", "NAME", "EPOCH", "HEAD", ">SHARDS", "ROOT", "CHECKPOINT"]);
        for view in &self.volumes {
            let name = view.name.as_ref().map_or_else(String::new, |name| name.0.clone());
            let epoch = if view.deleted { "deleted".to_owned() } else { view.epoch.to_string() };
            let (root, checkpoint) = match &view.mirror {
                None => ("-".to_owned(), "-".to_owned()),
                Some(mirror) => mirror.texts(),
            };
            table.row(vec![
                view.volume.to_string(),
                non_empty(name, "-"),
                epoch,
                view.head.to_string(),
                view.shards.to_string(),
                root,
                checkpoint,
            ]);
        }
        table.render()
    }
}

fn shard_table(shards: &[ShardView]) -> String {
    let mut table = Table::new(&[
        ">SLOT",
        "VOLUME",
        ">SEGMENT",
        "KIND",
        "SCHEME",
        ">SHARD",
        "EPOCH",
        "STATE",
        ">BLOCKS",
        "WRITE SET",
    ]);
    for view in shards {
        let members: Vec<String> = view.members.iter().map(ToString::to_string).collect();
        table.row(vec![
            view.slot.to_string(),
            view.volume.to_string(),
            view.segment.to_string(),
            kind_text(view.kind).to_owned(),
            scheme_text(view.scheme),
            view.shard.to_string(),
            view.epoch.to_string(),
            state_text(view.state).to_owned(),
            view.blocks.map_or_else(|| "-".to_owned(), |blocks| blocks.to_string()),
            members.join(" "),
        ]);
    }
    table.render()
}

impl SuperblockView {
    fn text(&self) -> String {
        match (&self.fault, self.sequence) {
            (Some(fault), _) => format!("does not count: {fault}"),
            (None, sequence) => format!(
                "valid, write {}{}",
                sequence.unwrap_or(0),
                if self.counts { ", counts" } else { "" }
            ),
        }
    }
}

fn layout_text(layout: &Geometry) -> String {
    format!(
        "slot table at {}, volume table at {}, catalog at {}, checksums at {}, slot 0 at {}",
        layout.slot_table, layout.volume_table, layout.catalog, layout.checksums, layout.data
    )
}

impl CatalogView {
    fn text(&self) -> String {
        match &self.fault {
            Some(fault) => fault.clone(),
            None => format!(
                "incarnation {}, revision {}, {} keys",
                self.incarnation,
                self.revision,
                self.keys.len()
            ),
        }
    }
}

impl MirrorView {
    fn texts(&self) -> (String, String) {
        let revision = format!("{} #{}", self.epoch, self.sequence);
        let Some(root) = &self.root else {
            let fault = self.fault.clone().unwrap_or_default();
            return (format!("{revision}: {fault}"), "-".to_owned());
        };
        let released = if root.released { ", released" } else { "" };
        let checkpoint = root.checkpoint.as_ref().map_or_else(
            || "-".to_owned(),
            |checkpoint| {
                let place = checkpoint.place;
                format!(
                    "#{} up to LSN {} at segment {} block {}",
                    place.sequence, place.lsn, place.segment, place.block
                )
            },
        );
        (revision + released, checkpoint)
    }
}

fn superblock_views(copies: &[SuperblockCopy; 2]) -> Vec<SuperblockView> {
    let sequence = |copy: &SuperblockCopy| copy.found.as_ref().ok().map(|found| found.sequence);
    let counts = newer_copy([sequence(&copies[0]), sequence(&copies[1])]);
    let view = |(index, copy): (usize, &SuperblockCopy)| {
        let found: Option<&Superblock> = copy.found.as_ref().ok();
        SuperblockView {
            offset: copy.offset,
            counts: counts == Some(index),
            sequence: sequence(copy),
            formatted: found.map(|found| found.complete),
            fault: copy.found.as_ref().err().cloned(),
        }
    };
    copies.iter().enumerate().map(view).collect()
}

fn volume_view(fence: &VolumeFence, shards: u32) -> VolumeView {
    let mirror = fence.mirror.as_ref().map(|mirror| {
        let decoded = Root::decode(&mirror.data);
        MirrorView {
            epoch: mirror.revision.0,
            sequence: mirror.revision.1,
            bytes: mirror.data.len(),
            fault: decoded.as_ref().err().map(ToString::to_string),
            root: decoded.ok(),
        }
    });
    VolumeView {
        volume: fence.volume,
        name: VolumeName::of(fence),
        epoch: fence.epoch,
        deleted: fence.epoch == Epoch::TOMBSTONE,
        head: fence.head,
        shards,
        mirror,
    }
}

fn catalog_view(found: &Inspection) -> CatalogView {
    let catalog = match &found.catalog {
        Ok(catalog) => catalog,
        Err(error) => {
            return CatalogView { fault: Some(error.to_string()), ..CatalogView::default() };
        }
    };
    let mut view = CatalogView {
        incarnation: catalog.incarnation,
        revision: catalog.revision,
        ..CatalogView::default()
    };
    if catalog.data.is_empty() {
        return view;
    }
    match catalog::decode(&catalog.data) {
        Ok(entries) => view.keys = entries.into_iter().map(|(key, _)| key).collect(),
        Err(error) => view.fault = Some(format!("the catalog cannot be decoded: {error}")),
    }
    view
}

fn page_views(found: &Inspection) -> Vec<PageView> {
    let copy = |copy: &Result<u64, String>| match copy {
        Ok(sequence) => format!("write {sequence}"),
        Err(fault) => fault.clone(),
    };
    let views = found.pages.iter().map(|page| PageView {
        table: page.table,
        page: page.page,
        damaged: page.damaged,
        copies: page.copies.iter().map(copy).collect(),
    });
    views.collect()
}
