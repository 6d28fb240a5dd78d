//! Checks SentencePiece's character map before it is walked.
//!
//! The map is `u32 byte count of the trie, trie: [u32], texts`, the trie a double array (Darts):
//! from the unit at `p`, the byte `c` leads to the unit `p ^ offset ^ c`; texts end with a zero
//! byte. The reader in the `tokenizers` crate indexes without asking, so a damaged file would stop
//! the program; here every reachable step is taken once beforehand.

use super::sentencepiece::SentencePieceError;

/// Accepts a map that no text can lead out of; an empty one means that there is none.
pub(super) fn check(charsmap: &[u8]) -> Result<(), SentencePieceError> {
    if charsmap.is_empty() {
        return Ok(());
    }
    let damaged = |what| SentencePieceError::Charsmap { what };
    let Some((head, rest)) = charsmap.split_first_chunk::<4>() else {
        return Err(damaged("shorter than its head"));
    };
    let num_bytes = u32::from_le_bytes(*head) as usize;
    if num_bytes == 0 || !num_bytes.is_multiple_of(4) || num_bytes > rest.len() {
        return Err(damaged("size of the trie"));
    }
    let (trie, texts) = rest.split_at(num_bytes);
    let texts = std::str::from_utf8(texts).map_err(|_| damaged("texts are not UTF-8"))?;
    let units: Vec<usize> = trie
        .as_chunks::<4>()
        .0
        .iter()
        .map(|unit| u32::from_le_bytes(*unit) as usize)
        .collect();

    let mut seen = vec![false; units.len()];
    let mut open = vec![0usize];
    seen[0] = true;
    while let Some(position) = open.pop() {
        let unit = units[position];
        let base = position ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6));
        // `c` changes the low 8 bits only, so the highest of the block decides.
        if (base | 0xff) >= units.len() {
            return Err(damaged("a step leads out of the trie"));
        }
        if (unit >> 8) & 1 == 1 {
            let text = units[base] & 0x7fff_ffff;
            if !texts.is_char_boundary(text) {
                return Err(damaged("a value points into no text"));
            }
        }
        for byte in 1..=255usize {
            let next = base ^ byte;
            if units[next] & 0x8000_00ff == byte && !seen[next] {
                seen[next] = true;
                open.push(next);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A trie of 256 units that maps `a` to the text at `value`.
    fn map_of_a(value: u32, texts: &str) -> Vec<u8> {
        let mut units = [0u32; 256];
        units[0] = 1 << 10; // base 1
        units[1 ^ 0x61] = 0x61 | (1 << 8) | (2 << 10); // label a, has a value at 0x60 ^ 2
        units[(1 ^ 0x61) ^ 2] = 0x8000_0000 | value;
        let mut map = 1024u32.to_le_bytes().to_vec();
        map.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
        map.extend(texts.as_bytes());
        map
    }

    #[test]
    fn a_sound_map_passes() {
        check(&map_of_a(2, "é\0")).expect("the value points behind the letter");
        check(&[]).expect("no map is no fault");
    }

    #[test]
    fn a_value_inside_a_letter_or_past_the_texts_is_refused() {
        for value in [1, 9] {
            let error = check(&map_of_a(value, "é\0")).expect_err("the value is wrong");
            assert!(error.to_string().contains("into no text"), "{error}");
        }
    }

    #[test]
    fn a_step_out_of_the_trie_is_refused() {
        let mut map = map_of_a(0, "e\0");
        map[4..8].copy_from_slice(&(300u32 << 10).to_le_bytes());
        let error = check(&map).expect_err("300 is behind the last unit");
        assert!(error.to_string().contains("out of the trie"), "{error}");
    }

    #[test]
    fn a_trie_longer_than_the_file_is_refused() {
        check(&[255, 255, 255, 255, 0]).expect_err("there is one byte");
    }
}
