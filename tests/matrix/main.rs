//! The matrix: every kind of ring, buffer and attachment, with every driver at hand.
//!
//! Each cell ([`cells::Cell`]) is one attachment of a pair of guests, and frames of all lengths in
//! both directions through it. It checks what was negotiated (nothing is silently replaced), that
//! every frame arrives once, unchanged and in order, that buffers are conserved, and that the
//! counters of Pollux and of the driver agree. What a driver refuses is listed and checked to be
//! refused.
//!
//! Every run tries a cover of all pairs, and a refused cell for each reason, chosen by the seed in
//! `POLLUX_MATRIX_SEED` (1 unless it is set); the ignored test tries all cells
//! (`tests/run --matrix`) and writes `tests/MATRIX.md`, or with `POLLUX_MATRIX_PART=1/8` the first
//! of eight parts of them, and writes nothing. An empty `POLLUX_MATRIX_GUESTS` leaves out the cells
//! that need QEMU (`tests/run --quick`), and `POLLUX_MATRIX_DRIVER=qemu` all others: `tests/run`
//! tries those again with the QEMU that `QEMU` names.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, like tests"
)]

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod cells;
mod dpdk;
mod qemu;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::Instant;

use cells::{Cell, Driver, cells, cover, page, refused};
use serde_json::Value;

/// Where the list of all cells is.
fn page_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/MATRIX.md")
}

/// Why a cell cannot be tried here, or is not to be.
fn hindrance(cell: &Cell) -> Option<&'static str> {
    let no_guests = std::env::var("POLLUX_MATRIX_GUESTS").is_ok_and(|wanted| wanted.is_empty());
    if no_guests && cell.driver == Driver::Qemu {
        return Some("no guests are wanted");
    }
    let vectors = cell.packed && cell.vectorized && cell.refusal().is_none();
    (vectors && !std::arch::is_x86_feature_detected!("avx512f"))
        .then_some("needs AVX-512, which this processor lacks")
}

fn run(cell: &Cell) {
    match cell.driver {
        Driver::Dpdk => dpdk::run(cell),
        Driver::Bench => bench::run(cell),
        Driver::Qemu => qemu::run(cell),
    }
}

/// What Pollux has negotiated with a port's frontend is what the cell says.
fn assert_negotiated(cell: &Cell, port: &Value) {
    let session = &port["session"];
    let features: Vec<&str> = session["features"]
        .as_array()
        .expect("features")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    for (name, wanted) in [
        ("ring_packed", cell.packed),
        ("mrg_rxbuf", cell.mergeable),
        ("in_order", cell.in_order),
    ] {
        assert_eq!(features.contains(&name), wanted, "{name} of {features:?}");
    }
    let rings = session["rings"].as_array().expect("rings");
    assert_eq!(rings.len(), 2 * usize::from(cell.queues), "{rings:?}");
    for ring in rings {
        let kind = if cell.packed { "packed" } else { "split" };
        assert_eq!(ring["kind"], kind, "{ring}");
        assert_eq!(ring["size"], cell.entries, "{ring}");
        assert_eq!(ring["state"], "running", "{ring}");
    }
}

/// Runs all, one after the other, each also after a failure; fails if any did. Whether none was
/// left out.
fn run_all(cells: &[Cell]) -> bool {
    let (mut failed, mut left_out) = (Vec::new(), false);
    for (n, cell) in cells.iter().enumerate() {
        let begin = Instant::now();
        let outcome = match (hindrance(cell), cell.refusal()) {
            (Some(reason), _) => {
                left_out = true;
                format!("left out: {reason}")
            }
            _ if catch_unwind(AssertUnwindSafe(|| run(cell))).is_err() => {
                failed.push(cell.to_string());
                "FAILED".to_string()
            }
            (None, Some(reason)) => format!("refused: {reason}"),
            (None, None) => "ok".to_string(),
        };
        println!(
            "{}/{} {cell}: {outcome} ({:.1} s)",
            n + 1,
            cells.len(),
            begin.elapsed().as_secs_f64()
        );
    }
    assert!(
        failed.is_empty(),
        "{} cells failed: {failed:#?}",
        failed.len()
    );
    !left_out
}

/// `POLLUX_MATRIX_PART`, as in `1/8`.
fn part() -> Option<(usize, usize)> {
    let text = std::env::var("POLLUX_MATRIX_PART").ok()?;
    let (part, parts) = text.split_once('/').expect("PART/PARTS");
    Some((part.parse().unwrap(), parts.parse().unwrap()))
}

/// The drivers that are tried: all, or the one in `POLLUX_MATRIX_DRIVER`.
fn drivers() -> Vec<Driver> {
    let Ok(wanted) = std::env::var("POLLUX_MATRIX_DRIVER") else {
        return Driver::ALL.to_vec();
    };
    let named = |driver: &Driver| format!("{driver:?}").eq_ignore_ascii_case(&wanted);
    let found: Vec<Driver> = Driver::ALL.into_iter().filter(named).collect();
    assert!(
        !found.is_empty(),
        "POLLUX_MATRIX_DRIVER={wanted}: no such driver"
    );
    found
}

#[test]
fn a_cover_of_all_pairs_passes() {
    let seed = std::env::var("POLLUX_MATRIX_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("POLLUX_MATRIX_SEED={seed}");
    let begin = Instant::now();
    let chosen = drivers().into_iter().flat_map(|driver| {
        let cells = cells(driver);
        // What a peer refuses is no more than a claim until it is seen to refuse it.
        [cover(&cells, seed), refused(&cells, seed)].concat()
    });
    run_all(&chosen.collect::<Vec<_>>());
    let seconds = begin.elapsed().as_secs();
    println!("POLLUX_MATRIX_SEED={seed}: {seconds} s");
}

#[test]
#[ignore = "half an hour: tests/run --matrix"]
fn every_cell_passes() {
    let drivers = drivers();
    let mut whole = drivers == Driver::ALL;
    let mut all: Vec<Cell> = drivers.into_iter().flat_map(cells).collect();
    if let Some((part, parts)) = part() {
        whole = false;
        let mut at = 0..;
        all.retain(|_| at.next().is_some_and(|at| at % parts == part % parts));
    }
    if run_all(&all) && whole {
        std::fs::write(page_path(), page()).unwrap();
    } else {
        println!(
            "cells were left out, so {} stays as it is",
            page_path().display()
        );
    }
}

#[test]
fn the_list_of_cells_is_up_to_date() {
    let written = std::fs::read_to_string(page_path()).unwrap_or_default();
    assert!(
        written == page(),
        "{} does not list the cells as they are; tests/run --matrix writes it anew",
        page_path().display()
    );
}
