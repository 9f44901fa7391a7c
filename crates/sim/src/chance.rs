//! Numbers by a seed (SplitMix64: Steele, Lea, Flood 2014): the same seed is the same world, on any machine.

#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `min` to `max`, which is one of them.
    pub fn between(&mut self, min: u64, max: u64) -> u64 {
        min + self.next() % (max - min + 1)
    }

    pub fn index(&mut self, count: usize) -> usize {
        usize::try_from(self.between(0, count as u64 - 1)).unwrap_or(0)
    }

    /// So many times of a thousand.
    pub fn happens(&mut self, permille: u64) -> bool {
        self.between(0, 999) < permille
    }
}
