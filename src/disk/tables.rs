//! Slot table and volume table in memory: what the disk holds, and who may do what with it.
//!
//! No I/O here. The tables run ahead of the device: a change is made here first and counts for
//! every later request at once; the request that made it is answered when the page is durable.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use tokio::sync::Mutex;

use crate::disk::format::{
    ENTRIES_PER_PAGE, ShardRecord, SlotPage, VolumePage, VolumeRecord, encode_page,
};
use crate::disk::geometry::Geometry;
use crate::disk::stats::SlotCounts;
use crate::disk::writer::Writer;
use crate::id::{DiskId, Epoch, HeadId, SegmentId, VolumeId};
use crate::planted::{Bug, bug};
use crate::shard::reserve;
use crate::shard::{
    Authority, Mirror, ShardError, ShardInfo, ShardResult, ShardSpec, ShardState, SlotClass,
    VolumeFence, VolumeOnDisk,
};

/// A page of one of the two tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum TablePage {
    Slots(u32),
    Volumes(u32),
}

/// Where a slot is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// In no use, and in the free list.
    Free,
    /// Its entry is not durable yet: takes no appends.
    Creating,
    /// Holds a shard.
    Live,
    /// The shard is gone for everybody, but its entry is not durably cleared yet.
    Deleting,
    /// Cleared; free once nothing pins it.
    Freed,
    /// Its table page is unreadable.
    Damaged,
}

pub(super) struct Slot {
    pub(super) phase: Phase,
    /// Present in phases `Creating`, `Live` and `Deleting`.
    pub(super) record: Option<Rc<ShardRecord>>,
    /// I/O operations under way on the slot.
    pub(super) pins: u32,
    /// The open end; of a closed shard as long as it may have appends under way.
    pub(super) writer: Option<Rc<Writer>>,
    /// Held while the shard is being sealed.
    pub(super) seal_lock: Option<Rc<Mutex<()>>>,
}

impl Slot {
    fn new(phase: Phase) -> Self {
        Self { phase, record: None, pins: 0, writer: None, seal_lock: None }
    }
}

pub(super) struct Volume {
    pub(super) page: u32,
    pub(super) record: VolumeRecord,
    /// The tombstone is being forgotten: its page is written as free.
    pub(super) forgotten: bool,
}

/// Where a new shard goes.
pub(super) enum Placed {
    /// Into this slot.
    At(u32),
    /// Nowhere before the shard's earlier creation, in this slot, is durably deleted: there must
    /// never be two on the medium.
    After(u32),
}

pub(super) struct Tables {
    pub(super) disk: DiskId,
    pub(super) geometry: Geometry,
    pub(super) slots: Vec<Slot>,
    pub(super) free: BTreeSet<u32>,
    pub(super) shards: BTreeMap<(VolumeId, SegmentId), u32>,
    pub(super) volumes: BTreeMap<VolumeId, Volume>,
    pub(super) volume_pages_free: BTreeSet<u32>,
    pub(super) damaged_slot_pages: u32,
    pub(super) damaged_volume_pages: u32,
    pub(super) slot_sequences: Vec<u64>,
    pub(super) volume_sequences: Vec<u64>,
}

fn not_fenced(authority: Authority, record: &VolumeRecord) -> ShardResult<()> {
    let newer = record.epoch > authority.epoch;
    if newer || (record.epoch == authority.epoch && record.head != authority.head) {
        return Err(ShardError::Fenced(record.epoch));
    }
    Ok(())
}

impl Tables {
    /// Tables without slots or volumes; the reader of the disk adds them page by page.
    pub(super) fn new(disk: DiskId, geometry: Geometry) -> Self {
        Self {
            disk,
            geometry,
            slots: Vec::with_capacity(geometry.slots as usize),
            free: BTreeSet::new(),
            shards: BTreeMap::new(),
            volumes: BTreeMap::new(),
            volume_pages_free: BTreeSet::new(),
            damaged_slot_pages: 0,
            damaged_volume_pages: 0,
            slot_sequences: Vec::with_capacity(geometry.slot_pages() as usize),
            volume_sequences: Vec::with_capacity(geometry.volumes_max as usize),
        }
    }

    /// Adds the next slot as read from its page. A shard that was open is now closed.
    pub(super) fn load_slot(&mut self, record: Option<ShardRecord>) -> Result<(), String> {
        let number = u32::try_from(self.slots.len()).map_err(|e| e.to_string())?;
        let mut slot = Slot::new(Phase::Free);
        match record {
            None => {
                self.free.insert(number);
            }
            Some(mut record) => {
                if record.blocks > self.geometry.slot_blocks() {
                    return Err(format!("slot {number}: length beyond the slot"));
                }
                if record.state == ShardState::Open {
                    record.state = ShardState::Closed;
                }
                let key = (record.spec.volume, record.spec.segment);
                if let Some(other) = self.shards.insert(key, number) {
                    return Err(format!("slots {other} and {number} hold the same shard"));
                }
                slot.phase = Phase::Live;
                slot.record = Some(Rc::new(record));
            }
        }
        self.slots.push(slot);
        Ok(())
    }

    /// Adds the slots of an unreadable page.
    pub(super) fn load_damaged_slots(&mut self, count: usize) {
        self.damaged_slot_pages += 1;
        self.slots.extend((0..count).map(|_| Slot::new(Phase::Damaged)));
    }

    /// Adds a volume page; an unreadable one is `Err`.
    pub(super) fn load_volume(
        &mut self,
        page: u32,
        record: Result<Option<VolumeRecord>, ()>,
    ) -> Result<(), String> {
        match record {
            Err(()) => self.damaged_volume_pages += 1,
            Ok(None) => {
                self.volume_pages_free.insert(page);
            }
            Ok(Some(mut record)) => {
                if bug(Bug::ForgetFence) {
                    record.epoch = Epoch::new(1, 0);
                }
                let volume = record.volume;
                let entry = Volume { page, record, forgotten: false };
                if let Some(other) = self.volumes.insert(volume, entry) {
                    return Err(format!(
                        "volume pages {} and {page} are of one volume",
                        other.page
                    ));
                }
            }
        }
        Ok(())
    }

    /// The table page as it is to be written now.
    pub(super) fn encode(&mut self, page: TablePage, buf: &mut [u8]) {
        match page {
            TablePage::Slots(number) => {
                let sequence = &mut self.slot_sequences[number as usize];
                *sequence += 1;
                let first = number as usize * ENTRIES_PER_PAGE;
                let slots = self.slots[first..].iter().take(ENTRIES_PER_PAGE);
                encode_page(buf, self.disk, number.into(), *sequence, |page: &mut SlotPage| {
                    for (slot, entry) in slots.zip(&mut page.entries) {
                        let kept = matches!(slot.phase, Phase::Creating | Phase::Live);
                        if let Some(record) = slot.record.as_ref().filter(|_| kept) {
                            record.encode(entry);
                        }
                    }
                });
            }
            TablePage::Volumes(number) => {
                let sequence = &mut self.volume_sequences[number as usize];
                *sequence += 1;
                let mut volumes = self.volumes.values();
                let volume = volumes.find(|volume| volume.page == number && !volume.forgotten);
                encode_page(buf, self.disk, number.into(), *sequence, |page: &mut VolumePage| {
                    if let Some(volume) = volume {
                        volume.record.encode(page);
                    }
                });
            }
        }
    }

    /// The fence of a volume; none if the disk never heard of it.
    pub(super) fn fence_of(&self, volume: VolumeId) -> ShardResult<Option<&Volume>> {
        let found = self.volumes.get(&volume);
        if found.is_none() && self.damaged_volume_pages > 0 {
            return Err(damaged("volume", self.damaged_volume_pages));
        }
        Ok(found)
    }

    /// Whether a request in the name of `authority` may still be done.
    pub(super) fn authorize(&self, authority: Authority) -> ShardResult<()> {
        match self.fence_of(authority.volume)? {
            Some(volume) => not_fenced(authority, &volume.record),
            None => Ok(()),
        }
    }

    /// Raises the fence and takes up a newer mirror. Gives the page of the volume and whether it
    /// has to be written. Open shards of older epochs are closed.
    pub(super) fn raise(
        &mut self,
        authority: Authority,
        mirror: Option<Mirror>,
    ) -> ShardResult<(TablePage, bool)> {
        self.authorize(authority)?;
        let Authority { volume, epoch, head } = authority;
        let mut changed = false;
        if !self.volumes.contains_key(&volume) {
            let page = self.volume_pages_free.pop_first().ok_or(ShardError::NoSpace)?;
            let record = VolumeRecord { volume, epoch, head, mirror: None };
            self.volumes.insert(volume, Volume { page, record, forgotten: false });
            changed = true;
        }
        let entry = self.volumes.get_mut(&volume).expect("present or just inserted");
        let page = TablePage::Volumes(entry.page);
        let raised = entry.record.epoch < epoch;
        if raised {
            (entry.record.epoch, entry.record.head) = (epoch, head);
        }
        let known = entry.record.mirror.as_ref().map(|mirror| mirror.revision);
        if mirror.as_ref().is_some_and(|mirror| Some(mirror.revision) > known) {
            entry.record.mirror = mirror;
            changed = true;
        }
        if raised {
            self.close_older(volume, epoch);
        }
        Ok((page, changed || raised))
    }

    /// Makes the volume a tombstone.
    pub(super) fn bury(&mut self, volume: VolumeId) -> ShardResult<(TablePage, bool)> {
        let head = HeadId::default();
        if self.fence_of(volume)?.is_some_and(|found| found.record.epoch == Epoch::TOMBSTONE) {
            return Ok((TablePage::Volumes(self.volumes[&volume].page), false));
        }
        let authority = Authority { volume, epoch: Epoch::TOMBSTONE, head };
        let (page, _) = self.raise(authority, None)?;
        if let Some(entry) = self.volumes.get_mut(&volume) {
            entry.record.mirror = None;
        }
        Ok((page, true))
    }

    fn close_older(&mut self, volume: VolumeId, epoch: Epoch) {
        for number in self.slots_of(volume) {
            let slot = &mut self.slots[number as usize];
            let Some(record) = &mut slot.record else { continue };
            if record.state == ShardState::Open && record.epoch < epoch {
                Rc::make_mut(record).state = ShardState::Closed;
                if let Some(writer) = &slot.writer {
                    writer.forget_crcs();
                }
            }
        }
    }

    /// Slots with a shard of the volume, by segment; those being deleted too.
    pub(super) fn slots_of(&self, volume: VolumeId) -> Vec<u32> {
        let all = (volume, SegmentId(0))..=(volume, SegmentId(u64::MAX));
        self.shards.range(all).map(|(_, slot)| *slot).collect()
    }

    /// The slot and record of a shard that was not deleted.
    pub(super) fn find(
        &self,
        volume: VolumeId,
        segment: SegmentId,
    ) -> ShardResult<(u32, &Slot, &Rc<ShardRecord>)> {
        if let Some(number) = self.shards.get(&(volume, segment)) {
            let slot = &self.slots[*number as usize];
            return match &slot.record {
                Some(record) if slot.phase != Phase::Deleting => Ok((*number, slot, record)),
                _ => Err(ShardError::Gone),
            };
        }
        if self.damaged_slot_pages > 0 {
            return Err(damaged("slot", self.damaged_slot_pages));
        }
        Err(ShardError::Gone)
    }

    /// Puts a new, open shard into a free slot.
    pub(super) fn place(
        &mut self,
        authority: Authority,
        spec: &ShardSpec,
        class: SlotClass,
    ) -> ShardResult<Placed> {
        self.authorize(authority)?;
        match self.find(spec.volume, spec.segment) {
            Ok(_) => return Err(ShardError::Exists),
            Err(ShardError::Gone) => {}
            Err(error) => return Err(error),
        }
        let key = (spec.volume, spec.segment);
        if let Some(leaving) = self.shards.get(&key) {
            return Ok(Placed::After(*leaving));
        }
        let number = self.take_slot(class)?;
        let slot = &mut self.slots[number as usize];
        slot.phase = Phase::Creating;
        slot.record = Some(Rc::new(ShardRecord {
            spec: spec.clone(),
            epoch: authority.epoch,
            state: ShardState::Open,
            blocks: 0,
        }));
        slot.writer = Some(Rc::default());
        self.shards.insert(key, number);
        Ok(Placed::At(number))
    }

    /// Takes a free slot if the class may have one, leaving the reserves of higher classes.
    fn take_slot(&mut self, class: SlotClass) -> ShardResult<u32> {
        let reserve = reserve::floor(class, self.geometry.slots);
        if self.free.len() <= reserve as usize {
            return Err(ShardError::NoSpace);
        }
        self.free.pop_first().ok_or(ShardError::NoSpace)
    }

    /// Puts a slot into the free list if its entry is cleared and nothing pins it.
    pub(super) fn release_if_idle(&mut self, number: u32) {
        let slot = &mut self.slots[number as usize];
        if slot.phase == Phase::Freed && (slot.pins == 0 || bug(Bug::ReuseBeforeReap)) {
            *slot = Slot::new(Phase::Free);
            self.free.insert(number);
        }
    }

    /// What the disk holds of a volume.
    pub(super) fn list(&self, volume: VolumeId) -> ShardResult<VolumeOnDisk> {
        if self.damaged_slot_pages > 0 {
            return Err(damaged("slot", self.damaged_slot_pages));
        }
        let mirror = self.fence_of(volume)?.and_then(|found| found.record.mirror.clone());
        let slots = self.slots_of(volume);
        let shards = slots.into_iter().filter_map(|number| self.shard_info(number)).collect();
        Ok(VolumeOnDisk { shards, mirror })
    }

    /// All fences, by volume.
    pub(super) fn fences(&self) -> Vec<VolumeFence> {
        let records = self.volumes.values().map(|volume| &volume.record);
        let fences = records.map(|record| VolumeFence {
            volume: record.volume,
            epoch: record.epoch,
            head: record.head,
            mirror: record.mirror.clone(),
        });
        fences.collect()
    }

    /// What is known of the shard in a slot; none if there is none, or it is being deleted.
    pub(super) fn shard_info(&self, number: u32) -> Option<ShardInfo> {
        let slot = &self.slots[number as usize];
        let record = slot.record.as_ref().filter(|_| slot.phase != Phase::Deleting)?;
        let blocks = match &slot.writer {
            Some(writer) if record.state != ShardState::Sealed => writer.durable(),
            _ => record.blocks,
        };
        Some(ShardInfo {
            spec: record.spec.clone(),
            epoch: record.epoch,
            state: record.state,
            blocks,
        })
    }

    /// Slots by state.
    pub(super) fn slot_counts(&self) -> SlotCounts {
        let mut counts = SlotCounts::default();
        for slot in &self.slots {
            let state = slot.record.as_ref().map(|record| record.state);
            let count = match (slot.phase, state) {
                (Phase::Free, _) => &mut counts.free,
                (Phase::Damaged, _) => &mut counts.damaged,
                (Phase::Deleting | Phase::Freed, _) | (_, None) => &mut counts.freeing,
                (_, Some(ShardState::Open)) => &mut counts.open,
                (_, Some(ShardState::Closed)) => &mut counts.closed,
                (_, Some(ShardState::Sealed)) => &mut counts.sealed,
            };
            *count += 1;
        }
        counts
    }
}

/// The table page that holds a slot's entry.
pub(super) fn page_of_slot(slot: u32) -> TablePage {
    TablePage::Slots(slot / u32::try_from(ENTRIES_PER_PAGE).expect("a small constant"))
}

pub(super) fn damaged(table: &str, pages: u32) -> ShardError {
    ShardError::Damaged(format!("{pages} pages of the {table} table are unreadable"))
}
