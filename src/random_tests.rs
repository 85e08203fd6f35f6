//! What tests with random operations share: numbers that follow from a seed, and seeds that are
//! printed.

/// Numbers that depend on nothing but the seed: Knuth's multiplier; the upper bits are good enough
/// for test data.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    /// True once in so many times.
    pub(crate) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// Runs `test` with `rounds` seeds that begin at the time (fifty times as many with
/// `POLLUX_LONG=1`), or with the one of `POLLUX_SEED`.
pub(crate) fn with_seeds(rounds: usize, test: impl Fn(u64)) {
    if let Ok(seed) = std::env::var("POLLUX_SEED") {
        return test(seed.parse().expect("POLLUX_SEED is a number"));
    }
    let long = std::env::var_os("POLLUX_LONG").is_some_and(|value| value == "1");
    let rounds = if long { 50 * rounds } else { rounds };
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    for seed in (now.as_nanos() as u64..).take(rounds) {
        println!("POLLUX_SEED={seed}");
        test(seed);
    }
}
