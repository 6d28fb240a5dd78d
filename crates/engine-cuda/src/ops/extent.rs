//! What every wrapper asks of a view before its kernel may touch it: length and alignment.

use crate::view::View;

/// What vector accesses need of an address.
const VECTOR_BYTES: u64 = 16;

/// The first `count` elements of `bytes_each`, at an address fit for 16-byte accesses.
///
/// # Panics
///
/// If the view is shorter or not aligned.
pub(super) fn vectors(view: View, count: usize, bytes_each: usize, what: &str) -> View {
    assert_eq!(
        view.address() % VECTOR_BYTES,
        0,
        "alignment of {what} at {:#x}",
        view.address()
    );
    elements(view, count, bytes_each, what)
}

/// The first `count` elements of `bytes_each`.
///
/// # Panics
///
/// If the view is shorter.
pub(super) fn elements(view: View, count: usize, bytes_each: usize, what: &str) -> View {
    let bytes = count * bytes_each;
    view.holds(bytes, what).take(bytes)
}

/// Elements from the first to the last of `rows` rows that are `stride` apart and `width` wide.
///
/// # Panics
///
/// If rows overlap.
pub(super) fn strided(rows: usize, stride: usize, width: usize) -> usize {
    assert!(stride >= width, "rows of {width} elements, {stride} apart");
    rows.saturating_sub(1) * stride + width.min(rows * width)
}

/// Panics unless 16-byte vectors fit: all of `numbers` are multiples of 8.
pub(super) fn multiples_of_8(numbers: &[usize], what: &str) {
    assert!(
        numbers.iter().all(|number| number.is_multiple_of(8)),
        "{what} must be multiples of 8: {numbers:?}"
    );
}

/// A grid's size.
///
/// # Panics
///
/// If the device has no such grid.
pub(super) fn blocks(count: usize) -> u32 {
    i32::try_from(count).expect("a grid has fewer than 2^31 blocks") as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_row_of_a_strided_matrix_ends_with_its_width() {
        assert_eq!(strided(3, 10, 4), 24);
        assert_eq!(strided(0, 10, 4), 0);
    }

    #[test]
    #[should_panic(expected = "alignment of x at 0x8")]
    fn an_address_between_vectors_panics() {
        vectors(View::new(8, 64), 1, 2, "x");
    }
}
