//! What fails together: failure domains on several levels.
//!
//! A disk lies in one domain of each level. Two disks with the same number on a level share that
//! domain, and numbers of different levels have nothing to do with each other. A pool keeps the
//! shards of a segment apart on one level; several pools with different levels use the same disks.

use std::fmt;

/// A kind of failure domain, from the narrowest to the widest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// A disk.
    #[default]
    Disk,
    /// A node with all its disks.
    Node,
    /// A rack with all its nodes.
    Rack,
}

impl Level {
    /// All of them, from the narrowest to the widest.
    pub const ALL: [Self; 3] = [Self::Disk, Self::Node, Self::Rack];

    /// The next wider one; none above the widest.
    pub const fn wider(self) -> Option<Self> {
        match self {
            Self::Disk => Some(Self::Node),
            Self::Node => Some(Self::Rack),
            Self::Rack => None,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Disk => "disk",
            Self::Node => "node",
            Self::Rack => "rack",
        })
    }
}

/// The failure domains that a disk lies in: a number for each [`Level`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domains {
    /// Its own number: another for each disk.
    pub disk: u32,
    /// The number of its node.
    pub node: u32,
    /// The number of its node's rack.
    pub rack: u32,
}

impl Domains {
    /// Those of a disk of a cluster that is one node.
    pub const fn of_one_node(disk: u32) -> Self {
        Self { disk, node: 0, rack: 0 }
    }

    /// The number on a level.
    pub const fn at(self, level: Level) -> u32 {
        match level {
            Level::Disk => self.disk,
            Level::Node => self.node,
            Level::Rack => self.rack,
        }
    }
}
