//! The cells of the matrix, what a peer refuses of them, and a cover of all pairs by few of them.

use std::collections::HashSet;
use std::fmt;

/// Lengths of the frames that go through every cell, without check sequence.
pub(crate) const SIZES: [usize; 4] = [60, 64, 1514, 9000];

/// Who plays the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Driver {
    /// DPDK's virtio-user, in testpmd.
    Dpdk,
    /// `pollux bench`.
    Bench,
    /// Linux in QEMU.
    Qemu,
}

impl Driver {
    pub(crate) const ALL: [Driver; 3] = [Driver::Dpdk, Driver::Bench, Driver::Qemu];
}

/// One attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Cell {
    pub(crate) driver: Driver,
    pub(crate) packed: bool,
    pub(crate) mergeable: bool,
    pub(crate) in_order: bool,
    pub(crate) vectorized: bool,
    pub(crate) entries: u16,
    /// Queue pairs of each guest.
    pub(crate) queues: u16,
    /// The frontend listens, Pollux connects.
    pub(crate) client: bool,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let when = |set: bool, word: &'static str| if set { word } else { "" };
        write!(
            f,
            "{:?} {}{}{}{}, {} entries, {} queues, Pollux {}",
            self.driver,
            if self.packed { "packed" } else { "split" },
            when(self.mergeable, ", mergeable"),
            when(self.in_order, ", in order"),
            when(self.vectorized, ", vectorised"),
            self.entries,
            self.queues,
            if self.client { "connects" } else { "listens" },
        )
    }
}

impl Cell {
    /// Each dimension's value.
    fn values(&self) -> [u16; 7] {
        [
            u16::from(self.packed),
            u16::from(self.mergeable),
            u16::from(self.in_order),
            u16::from(self.vectorized),
            self.entries,
            self.queues,
            u16::from(self.client),
        ]
    }

    /// Every two dimensions with their values.
    fn pairs(&self) -> impl Iterator<Item = [(usize, u16); 2]> {
        let values = self.values();
        (0..values.len()).flat_map(move |b| (0..b).map(move |a| [(a, values[a]), (b, values[b])]))
    }

    /// Why the driver does not do this, whatever the backend offers; it takes another path instead.
    pub(crate) fn refusal(&self) -> Option<&'static str> {
        match self {
            Cell {
                vectorized: false, ..
            } => None,
            Cell {
                packed: true,
                in_order: false,
                ..
            } => Some("DPDK has vectors for packed rings in order only"),
            Cell { packed: true, .. } => None,
            Cell { in_order: true, .. } => Some("DPDK has no vectors for split rings in order"),
            Cell {
                mergeable: true, ..
            } => Some("DPDK has no vectors for split rings with mergeable buffers"),
            _ => None,
        }
    }

    /// Whether the driver takes a vectorised path to receive, and to send.
    pub(crate) fn vectors(&self) -> [bool; 2] {
        if !self.vectorized || self.refusal().is_some() {
            [false; 2]
        } else if self.packed {
            [!self.mergeable, true]
        } else {
            [true, false]
        }
    }

    /// What the driver does not do of this, in one direction only.
    fn refused_in_part(&self) -> Option<&'static str> {
        match self.vectors() {
            [true, false] => Some("DPDK has no vectors to send into split rings"),
            [false, true] => Some("DPDK has no vectors to receive into mergeable buffers"),
            _ => None,
        }
    }

    /// The lengths that the driver can receive.
    pub(crate) fn sizes(&self) -> &'static [usize] {
        // Without mergeable buffers Linux posts room for 1518 bytes, whatever the MTU.
        if self.driver == Driver::Qemu && !self.mergeable {
            &SIZES[..3]
        } else {
            &SIZES
        }
    }
}

/// All cells of a driver.
pub(crate) fn cells(driver: Driver) -> Vec<Cell> {
    const BOTH: [bool; 2] = [false, true];
    const QUEUES: [u16; 2] = [1, 4];
    let linux = driver == Driver::Qemu;
    // What Linux in QEMU negotiates is not for us to choose: never in order, 256 entries.
    let choice: &[bool] = if linux { &[false] } else { &BOTH };
    let vectors: &[bool] = if driver == Driver::Dpdk {
        &BOTH
    } else {
        &[false]
    };
    let mut cells = Vec::new();
    for packed in BOTH {
        let entries: &[u16] = match (linux, packed) {
            (true, _) => &[256],
            (false, false) => &[64, 256, 1024],
            (false, true) => &[64, 256, 320, 1024],
        };
        for mergeable in BOTH {
            for &in_order in choice {
                for &vectorized in vectors {
                    for &entries in entries {
                        for queues in QUEUES {
                            cells.extend(choice.iter().map(|&client| Cell {
                                driver,
                                packed,
                                mergeable,
                                in_order,
                                vectorized,
                                entries,
                                queues,
                                client,
                            }));
                        }
                    }
                }
            }
        }
    }
    cells
}

/// A few of the cells that the driver does not refuse, in which every two values of different
/// dimensions that occur together in any of them do. `seed` decides between cells that are equally
/// good.
pub(crate) fn cover(cells: &[Cell], seed: u64) -> Vec<Cell> {
    let mut candidates = shuffled(cells, seed);
    candidates.retain(|cell| cell.refusal().is_none());
    let mut missing: HashSet<_> = candidates.iter().flat_map(Cell::pairs).collect();
    let mut chosen = Vec::new();
    while !missing.is_empty() {
        let new = |cell: &&Cell| cell.pairs().filter(|pair| missing.contains(pair)).count();
        let best = *candidates.iter().max_by_key(new).expect("they have pairs");
        best.pairs().for_each(|pair| {
            missing.remove(&pair);
        });
        chosen.push(best);
    }
    chosen
}

/// A cell for each reason that the driver has to refuse some of them.
pub(crate) fn refused(cells: &[Cell], seed: u64) -> Vec<Cell> {
    let mut reasons = HashSet::new();
    let mut chosen = shuffled(cells, seed);
    chosen.retain(|cell| cell.refusal().is_some_and(|reason| reasons.insert(reason)));
    chosen
}

fn shuffled(cells: &[Cell], seed: u64) -> Vec<Cell> {
    let mut cells = cells.to_vec();
    // xorshift64 wants anything but 0.
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for at in (1..cells.len()).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        cells.swap(at, (random % (at as u64 + 1)) as usize);
    }
    cells
}

/// `tests/MATRIX.md`: what every cell must do.
pub(crate) fn page() -> String {
    let mut page = String::from(
        "# The matrix\n\n\
         Every way to attach that is tried, with frames of the lengths in the last column. In each cell every\n\
         frame must arrive once, unchanged and in order within its flow, every buffer must come back, and the\n\
         counters of both sides must agree. A combination that the peer refuses, or refuses in one direction,\n\
         is listed as such, and the test checks that it does. `tests/run --matrix` tries all cells and writes\n\
         this page; every run of `tests/run` tries a cover of all pairs, and one refused cell for each\n\
         reason. Do not edit.\n",
    );
    for driver in Driver::ALL {
        page += match driver {
            Driver::Dpdk => "\n## DPDK virtio-user to DPDK virtio-user\n",
            Driver::Bench => "\n## `pollux bench` to `pollux bench`\n",
            Driver::Qemu => "\n## Linux in QEMU, to a scripted guest and back\n",
        };
        page += "\n| ring | mergeable | in order | vectorised | entries | queues | Pollux | bytes |\n|---|---|---|---|---|---|---|---|\n";
        for cell in cells(driver) {
            page += &row(&cell);
        }
    }
    page
}

fn row(cell: &Cell) -> String {
    let yes = |set: bool| if set { "yes" } else { "no" };
    let sizes = || {
        let sizes: Vec<String> = cell.sizes().iter().map(usize::to_string).collect();
        let mut said = sizes.join(", ");
        if sizes.len() < SIZES.len() {
            said += "; refused: 9000, more than Linux posts room for";
        }
        if let Some(part) = cell.refused_in_part() {
            said += &format!("; refused in part: {part}");
        }
        said
    };
    let refused = |reason: &str| format!("refused: {reason}");
    format!(
        "| {} | {} | {} | {} | {} | {} | {} | {} |\n",
        if cell.packed { "packed" } else { "split" },
        yes(cell.mergeable),
        yes(cell.in_order),
        yes(cell.vectorized),
        cell.entries,
        cell.queues,
        if cell.client { "connects" } else { "listens" },
        cell.refusal().map_or_else(sizes, refused),
    )
}

#[test]
fn the_cover_covers_every_pair_whatever_the_seed() {
    for driver in Driver::ALL {
        let cells = cells(driver);
        let possible = cells.iter().filter(|cell| cell.refusal().is_none());
        let pairs: HashSet<_> = possible.clone().flat_map(Cell::pairs).collect();
        for seed in 0..20 {
            let cover = cover(&cells, seed);
            let covered: HashSet<_> = cover.iter().flat_map(Cell::pairs).collect();
            assert_eq!(covered, pairs, "{driver:?}, seed {seed}");
            assert!(cover.iter().all(|cell| cell.refusal().is_none()));
            assert!(
                driver == Driver::Qemu || 3 * cover.len() < possible.clone().count(),
                "{driver:?}, seed {seed}: {} cells",
                cover.len()
            );
        }
    }
}

#[test]
fn of_refused_cells_there_is_one_for_each_reason_whatever_the_seed() {
    for driver in Driver::ALL {
        let cells = cells(driver);
        let reasons: HashSet<_> = cells.iter().filter_map(Cell::refusal).collect();
        assert_eq!(driver == Driver::Dpdk, reasons.len() == 3, "{reasons:?}");
        for seed in 0..20 {
            let chosen = refused(&cells, seed);
            assert_eq!(chosen.len(), reasons.len(), "{driver:?}, seed {seed}");
            let covered: HashSet<_> = chosen.iter().filter_map(Cell::refusal).collect();
            assert_eq!(covered, reasons, "{driver:?}, seed {seed}");
        }
    }
}
