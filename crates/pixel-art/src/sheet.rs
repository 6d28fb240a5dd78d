//! A contact sheet: many pictures side by side, magnified by a whole factor so that pixels stay squares.

use font8x8::legacy::BASIC_LEGACY;

use crate::{Rgb8, Rgba8};

/// Width and height of a letter.
const LETTER_PX: u32 = 8;
/// From one line of text to the next.
const LINE_PX: u32 = LETTER_PX + 2;

/// One picture on the sheet.
#[derive(Clone, Debug)]
pub struct SheetEntry<'a> {
    /// The picture; the sheet's background shows through its alpha.
    pub picture: &'a Rgba8,
    /// What stands below it; empty for nothing.
    pub label: &'a str,
}

/// How a sheet looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SheetStyle {
    /// Pictures in a row.
    pub columns: u32,
    /// Side of a picture's pixel on the sheet.
    pub magnify: u32,
    /// Space between pictures and around all.
    pub gap_px: u32,
    /// Most lines that a label may take; what does not fit is cut with `...`.
    pub label_lines: u32,
    /// Behind everything.
    pub background: [u8; 3],
    /// Labels.
    pub ink: [u8; 3],
}

impl SheetStyle {
    /// Width and height of a sheet of so many pictures of one size whose labels take all lines that they may, in pixels.
    /// No sheet of them is larger.
    pub fn largest_size_px(&self, count: usize, width_px: u32, height_px: u32) -> [u64; 2] {
        let columns = u64::from(self.columns).min(count as u64).max(1);
        let rows = (count as u64).div_ceil(columns);
        let label = u64::from(self.label_lines) * u64::from(LINE_PX) + 2;
        let side = |cells: u64, px: u32, more: u64| {
            let cell = u64::from(px) * u64::from(self.magnify);
            let step = cell.saturating_add(more + u64::from(self.gap_px));
            cells
                .saturating_mul(step)
                .saturating_add(self.gap_px.into())
        };
        [side(columns, width_px, 0), side(rows, height_px, label)]
    }
}

/// Draws the sheet. Every cell is as large as the largest picture; smaller ones stand in its middle.
///
/// # Panics
///
/// If there are no entries, `columns` or `magnify` is 0, or the sheet has more pixels than memory
/// ([`SheetStyle::largest_size_px`] tells).
pub fn contact_sheet(entries: &[SheetEntry<'_>], style: &SheetStyle) -> Rgb8 {
    assert!(
        !entries.is_empty() && style.columns > 0 && style.magnify > 0,
        "a sheet of {} pictures in {} columns, magnified by {}",
        entries.len(),
        style.columns,
        style.magnify
    );
    let largest = |side: fn(&Rgba8) -> u32| {
        let sides = entries.iter().map(|entry| side(entry.picture));
        sides.max().unwrap_or(0) * style.magnify
    };
    let (cell_w, cell_h) = (largest(|p| p.width_px), largest(|p| p.height_px));
    let letters = (cell_w / LETTER_PX) as usize;
    let labels: Vec<Vec<String>> = entries
        .iter()
        .map(|entry| wrap(entry.label, letters, style.label_lines as usize))
        .collect();
    let num_lines = labels.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let label_h = if num_lines == 0 {
        0
    } else {
        num_lines * LINE_PX + 2
    };

    let columns = style.columns.min(entries.len() as u32);
    let num_rows = (entries.len() as u32).div_ceil(columns);
    let (step_x, step_y) = (cell_w + style.gap_px, cell_h + label_h + style.gap_px);
    let mut sheet = Rgb8::filled(
        columns * step_x + style.gap_px,
        num_rows * step_y + style.gap_px,
        style.background,
    );
    for (index, (entry, lines)) in entries.iter().zip(&labels).enumerate() {
        let left = style.gap_px + index as u32 % columns * step_x;
        let top = style.gap_px + index as u32 / columns * step_y;
        let picture = entry.picture.over(style.background).magnify(style.magnify);
        let x_px = left + (cell_w - picture.width_px) / 2;
        let y_px = top + (cell_h - picture.height_px) / 2;
        sheet.paste(&picture, x_px, y_px);
        for (line, text) in lines.iter().enumerate() {
            let y_px = top + cell_h + 2 + line as u32 * LINE_PX;
            draw_text(&mut sheet, text, left, y_px, style.ink);
        }
    }
    sheet
}

/// Breaks a text at spaces into at most `max_lines` lines of at most `letters`; a longer word is cut.
fn wrap(text: &str, letters: usize, max_lines: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    if letters == 0 {
        return lines;
    }
    let mut line = String::new();
    let mut length = 0;
    for word in text.split_whitespace() {
        let mut rest: Vec<char> = word.chars().collect();
        if length > 0 && length + 1 + rest.len() <= letters {
            line.push(' ');
            length += 1;
        } else if length > 0 {
            lines.push(std::mem::take(&mut line));
            length = 0;
        }
        while rest.len() > letters {
            let tail = rest.split_off(letters);
            lines.push(rest.into_iter().collect());
            rest = tail;
        }
        length += rest.len();
        line.extend(rest);
    }
    if length > 0 {
        lines.push(line);
    }
    if lines.len() > max_lines {
        lines.truncate(max_lines);
        if let Some(last) = lines.last_mut() {
            let kept: String = last.chars().take(letters.saturating_sub(3)).collect();
            *last = format!("{}...", kept.trim_end());
        }
    }
    lines
}

/// Writes one line; letters outside of ASCII become `?`, what leaves the image is cut.
fn draw_text(image: &mut Rgb8, text: &str, x_px: u32, y_px: u32, ink: [u8; 3]) {
    for (index, letter) in text.chars().enumerate() {
        let rows = BASIC_LEGACY
            .get(letter as usize)
            .unwrap_or(&BASIC_LEGACY[usize::from(b'?')]);
        for (row, bits) in rows.iter().enumerate() {
            for column in 0..LETTER_PX {
                let x = x_px + index as u32 * LETTER_PX + column;
                let y = y_px + row as u32;
                if bits >> column & 1 == 1 && x < image.width_px && y < image.height_px {
                    let at = (y as usize * image.width_px as usize + x as usize) * 3;
                    image.pixels[at..at + 3].copy_from_slice(&ink);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STYLE: SheetStyle = SheetStyle {
        columns: 2,
        magnify: 3,
        gap_px: 1,
        label_lines: 2,
        background: [10, 20, 30],
        ink: [255; 3],
    };

    fn solid(side_px: u32, color: [u8; 4]) -> Rgba8 {
        Rgba8::new(side_px, side_px, color.repeat((side_px * side_px) as usize))
    }

    #[test]
    fn pictures_stand_in_cells_of_the_largest_with_gaps() {
        let (large, small) = (solid(4, [255, 0, 0, 255]), solid(2, [0, 255, 0, 255]));
        let clear = solid(4, [255, 0, 255, 0]);
        let entries = [&large, &small, &clear].map(|picture| SheetEntry { picture, label: "" });
        let sheet = contact_sheet(&entries, &STYLE);
        assert_eq!((sheet.width_px, sheet.height_px), (27, 27));
        assert_eq!(sheet.pixel(0, 0), [10, 20, 30]);
        assert_eq!(sheet.pixel(1, 1), [255, 0, 0]);
        assert_eq!(sheet.pixel(12, 12), [255, 0, 0]);
        assert_eq!(sheet.pixel(13, 1), [10, 20, 30]);
        assert_eq!(sheet.pixel(16, 3), [10, 20, 30]);
        assert_eq!(sheet.pixel(17, 4), [0, 255, 0]);
        assert_eq!(sheet.pixel(5, 20), [10, 20, 30]);
    }

    #[test]
    fn a_label_is_drawn_below_its_picture_only() {
        let picture = solid(8, [0, 0, 0, 255]);
        let entries = ["I", ""].map(|label| SheetEntry {
            picture: &picture,
            label,
        });
        let sheet = contact_sheet(&entries, &STYLE);
        assert_eq!(sheet.height_px, 1 + 24 + 12 + 1);
        let inked =
            |left: u32| (25..38).any(|y| (left..left + 24).any(|x| sheet.pixel(x, y) == [255; 3]));
        assert!(inked(1) && !inked(26));
    }

    #[test]
    fn a_long_label_is_wrapped_at_spaces_and_cut() {
        assert_eq!(
            wrap("red hair, gray armor", 10, 9),
            ["red hair,", "gray armor"]
        );
        assert_eq!(wrap("red hair, gray armor", 9, 2), ["red hair,", "gray..."]);
        assert_eq!(wrap("abcdefgh i", 3, 9), ["abc", "def", "gh", "i"]);
        assert_eq!(wrap("abc", 0, 2), Vec::<String>::new());
        assert_eq!(wrap("", 5, 2), Vec::<String>::new());
    }
}
