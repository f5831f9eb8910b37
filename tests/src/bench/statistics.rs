//! What the turns of one contestant amount to: the median, because one turn in a few is disturbed by something else on
//! the machine, and the spread, because it says how much of a difference means anything.

/// A contestant's turns.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Summary {
    /// The middle one; the mean of the two in the middle where their count is even.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Summary {
    /// Of these values; nothing where there is none.
    ///
    /// # Panics
    /// When one is not a number.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        assert!(values.iter().all(|value| value.is_finite()), "a measurement is a number");
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() {
            0 => return None,
            odd if odd % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        };
        Some(Self { median, least: sorted[0], most: sorted[sorted.len() - 1] })
    }
}

/// How many times `reference` a value is; nothing where that has no meaning.
#[must_use]
pub fn ratio(value: f64, reference: f64) -> Option<f64> {
    (reference > 0.0).then(|| value / reference)
}

/// How fast `value` grows with `size`, as the exponent between two points: 0 is flat, 1 is linear.
#[must_use]
pub fn exponent(from: (f64, f64), to: (f64, f64)) -> Option<f64> {
    let (sizes, values) = (ratio(to.0, from.0)?, ratio(to.1, from.1)?);
    (sizes > 1.0 && values > 0.0).then(|| values.ln() / sizes.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_whatever_the_order() {
        let rows = [
            (vec![3.0], [3.0, 3.0, 3.0]),
            (vec![4.0, 1.0], [2.5, 1.0, 4.0]),
            (vec![9.0, 1.0, 2.0], [2.0, 1.0, 9.0]),
            (vec![1.0, 100.0, 3.0, 2.0], [2.5, 1.0, 100.0]),
        ];
        for (values, [median, least, most]) in rows {
            assert_eq!(Summary::of(&values), Some(Summary { median, least, most }), "{values:?}");
        }
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn a_ratio_to_nothing_has_no_meaning() {
        assert_eq!(ratio(3.0, 2.0), Some(1.5));
        assert_eq!(ratio(3.0, 0.0), None);
    }

    #[test]
    fn exponents_tell_flat_from_linear() {
        assert_eq!(exponent((1.0, 5.0), (1000.0, 5.0)), Some(0.0));
        let linear = exponent((10.0, 2.0), (1000.0, 200.0)).unwrap();
        assert!((linear - 1.0).abs() < 1e-9);
        assert_eq!(exponent((10.0, 2.0), (10.0, 3.0)), None, "one size says nothing");
    }
}
