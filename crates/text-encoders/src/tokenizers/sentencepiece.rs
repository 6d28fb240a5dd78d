//! Reads a SentencePiece model file, as far as T5's Unigram tokenizer needs it.
//!
//! The file is one protocol buffer (`sentencepiece_model.proto`):
//!
//! ```text
//! ModelProto      1 pieces: SentencePiece*   2 trainer_spec   3 normalizer_spec
//! SentencePiece   1 piece: string   2 score: f32   3 type: 1 normal, 2 unknown, 3 control,
//!                                                          4 user defined, 5 unused, 6 byte
//! TrainerSpec     3 model_type: 1 unigram, 2 bpe, …      35 byte_fallback: bool
//! NormalizerSpec  2 precompiled_charsmap: bytes   3 add_dummy_prefix   4 remove_extra_whitespaces
//!                 5 escape_whitespaces
//! ```

use super::charsmap;

/// What a SentencePiece file holds that decides ids.
#[derive(Debug)]
pub(super) struct SentencePieceModel {
    /// In the order of their ids.
    pub(super) pieces: Vec<Piece>,
    /// Id of the unknown piece.
    pub(super) unknown: usize,
    /// The character map of the normaliser, checked; empty if there is none.
    pub(super) charsmap: Vec<u8>,
}

/// One entry of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    /// Log probability.
    pub(super) score: f32,
    /// Unknown and control pieces never come out of ordinary text.
    pub(super) is_special: bool,
}

/// Why a SentencePiece file is refused.
#[derive(Debug, thiserror::Error)]
pub enum SentencePieceError {
    /// The bytes end inside a field.
    #[error("the file ends inside a field at byte {offset}")]
    Truncated {
        /// Where the field starts, counted in its message.
        offset: usize,
    },
    /// Not a protocol buffer.
    #[error("no protocol buffer: field {field} at byte {offset} has wire type {wire_type}")]
    WireType {
        /// Number of the field.
        field: u64,
        /// Position in its message.
        offset: usize,
        /// The type found.
        wire_type: u8,
    },
    /// A piece is not UTF-8.
    #[error("piece {id} is not UTF-8")]
    PieceText {
        /// Its id.
        id: usize,
    },
    /// A score cannot be compared.
    #[error("piece {id} ({text:?}) has the score {score}")]
    PieceScore {
        /// Its id.
        id: usize,
        /// Its text.
        text: String,
        /// Its score.
        score: f32,
    },
    /// The model is of a kind that T5 does not use.
    #[error("{name} is not supported here: expected {expected}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// What T5's models have.
        expected: &'static str,
    },
    /// There must be one unknown piece.
    #[error("the file has {count} unknown pieces, one is expected")]
    Unknown {
        /// How many there are.
        count: usize,
    },
    /// The character map would lead outside itself.
    #[error("the character map of the normaliser is damaged ({what})")]
    Charsmap {
        /// What is wrong with it.
        what: &'static str,
    },
}

impl SentencePieceModel {
    /// Reads the whole file.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, SentencePieceError> {
        let mut pieces = Vec::new();
        let mut unknown = Vec::new();
        let mut charsmap = Vec::new();
        let mut message = Message::new(bytes);
        while let Some((field, value)) = message.next_field()? {
            match (field, value) {
                (1, Value::Bytes(piece)) => {
                    let id = pieces.len();
                    let (piece, kind) = read_piece(id, piece)?;
                    if kind == 2 {
                        unknown.push(id);
                    }
                    pieces.push(piece);
                }
                (2, Value::Bytes(trainer)) => check_trainer(trainer)?,
                (3, Value::Bytes(normalizer)) => charsmap = read_normalizer(normalizer)?,
                _ => {}
            }
        }
        let &[unknown] = unknown.as_slice() else {
            return Err(SentencePieceError::Unknown {
                count: unknown.len(),
            });
        };
        charsmap::check(&charsmap)?;
        Ok(Self {
            pieces,
            unknown,
            charsmap,
        })
    }
}

fn read_piece(id: usize, bytes: &[u8]) -> Result<(Piece, u64), SentencePieceError> {
    let (mut text, mut score, mut kind) = (String::new(), 0.0, 1);
    let mut message = Message::new(bytes);
    while let Some((field, value)) = message.next_field()? {
        match (field, value) {
            (1, Value::Bytes(piece)) => {
                text = String::from_utf8(piece.to_vec())
                    .map_err(|_| SentencePieceError::PieceText { id })?;
            }
            (2, Value::Fixed32(bits)) => score = f32::from_bits(bits),
            (3, Value::Varint(number)) => kind = number,
            _ => {}
        }
    }
    if !score.is_finite() {
        return Err(SentencePieceError::PieceScore { id, text, score });
    }
    let is_special = kind == 2 || kind == 3;
    Ok((
        Piece {
            text,
            score,
            is_special,
        },
        kind,
    ))
}

fn check_trainer(bytes: &[u8]) -> Result<(), SentencePieceError> {
    let mut message = Message::new(bytes);
    while let Some((field, value)) = message.next_field()? {
        match (field, value) {
            (3, Value::Varint(kind)) if kind != 1 => {
                return Err(SentencePieceError::Setting {
                    name: "model_type",
                    expected: "unigram",
                });
            }
            (35, Value::Varint(on)) if on != 0 => {
                return Err(SentencePieceError::Setting {
                    name: "byte_fallback",
                    expected: "false",
                });
            }
            _ => {}
        }
    }
    Ok(())
}

fn read_normalizer(bytes: &[u8]) -> Result<Vec<u8>, SentencePieceError> {
    let mut charsmap = Vec::new();
    let mut message = Message::new(bytes);
    while let Some((field, value)) = message.next_field()? {
        let name = match (field, value) {
            (2, Value::Bytes(map)) => {
                charsmap = map.to_vec();
                continue;
            }
            (3, Value::Varint(0)) => "add_dummy_prefix",
            (4, Value::Varint(0)) => "remove_extra_whitespaces",
            (5, Value::Varint(0)) => "escape_whitespaces",
            _ => continue,
        };
        return Err(SentencePieceError::Setting {
            name,
            expected: "true",
        });
    }
    Ok(charsmap)
}

enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
    Fixed64,
}

/// Walks over the fields of one message; no length in it is believed before it is checked.
struct Message<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Message<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, offset: 0 }
    }

    fn next_field(&mut self) -> Result<Option<(u64, Value<'a>)>, SentencePieceError> {
        if self.offset == self.bytes.len() {
            return Ok(None);
        }
        let start = self.offset;
        let key = self.varint(start)?;
        let (field, wire_type) = (key >> 3, (key & 7) as u8);
        let value = match wire_type {
            0 => Value::Varint(self.varint(start)?),
            1 => {
                self.take(8, start)?;
                Value::Fixed64
            }
            2 => {
                let length = self.varint(start)?;
                Value::Bytes(self.take(length, start)?)
            }
            5 => {
                let bytes = self.take(4, start)?;
                Value::Fixed32(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            _ => {
                return Err(SentencePieceError::WireType {
                    field,
                    offset: start,
                    wire_type,
                });
            }
        };
        Ok(Some((field, value)))
    }

    fn take(&mut self, length: u64, start: usize) -> Result<&'a [u8], SentencePieceError> {
        let truncated = SentencePieceError::Truncated { offset: start };
        let Ok(length) = usize::try_from(length) else {
            return Err(truncated);
        };
        match self.offset.checked_add(length) {
            Some(end) if end <= self.bytes.len() => {
                let taken = &self.bytes[self.offset..end];
                self.offset = end;
                Ok(taken)
            }
            _ => Err(truncated),
        }
    }

    fn varint(&mut self, start: usize) -> Result<u64, SentencePieceError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let Some(&byte) = self.bytes.get(self.offset) else {
                break;
            };
            self.offset += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(SentencePieceError::Truncated { offset: start })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
        let mut inner = vec![0x0a, text.len() as u8];
        inner.extend(text.as_bytes());
        inner.push(0x15);
        inner.extend(score.to_le_bytes());
        inner.extend([0x18, kind]);
        let mut outer = vec![0x0a, inner.len() as u8];
        outer.extend(inner);
        outer
    }

    /// `<pad> </s> <unk> ▁ red ▁red ▁hair r e d`, without a character map.
    pub(in super::super) fn tiny_model() -> Vec<u8> {
        let mut file = Vec::new();
        for (text, kind) in [("<pad>", 3), ("</s>", 3), ("<unk>", 2)] {
            file.extend(piece(text, 0.0, kind));
        }
        for (text, score) in [
            ("▁", -2.0),
            ("red", -3.0),
            ("▁red", -3.5),
            ("▁hair", -4.0),
            ("r", -5.0),
            ("e", -5.0),
            ("d", -5.0),
        ] {
            file.extend(piece(text, score, 1));
        }
        file
    }

    #[test]
    fn pieces_keep_their_order_score_and_kind() {
        let model = SentencePieceModel::parse(&tiny_model()).expect("the tiny model is whole");
        assert_eq!((model.pieces.len(), model.unknown), (10, 2));
        let red = Piece {
            text: "▁red".to_owned(),
            score: -3.5,
            is_special: false,
        };
        assert_eq!(model.pieces[5], red);
        assert!(model.pieces[1].is_special);
    }

    #[test]
    fn no_cut_of_the_file_panics() {
        let file = tiny_model();
        for length in 0..file.len() {
            // Every cut is an error: inside a field, or before the unknown piece, or fewer pieces.
            if let Ok(model) = SentencePieceModel::parse(&file[..length]) {
                assert!(model.pieces.len() < 10);
            }
        }
    }

    #[test]
    fn a_length_past_the_end_is_refused() {
        let error = SentencePieceModel::parse(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f, 1])
            .expect_err("the length is a lie");
        assert!(matches!(error, SentencePieceError::Truncated { offset: 0 }));
    }

    #[test]
    fn another_model_type_is_refused_by_name() {
        let mut file = tiny_model();
        file.extend([0x12, 2, 0x18, 2]); // trainer_spec { model_type: BPE }
        let error = SentencePieceModel::parse(&file).expect_err("byte pairs are not Unigram");
        assert!(error.to_string().contains("model_type"), "{error}");
    }

    #[test]
    fn two_unknown_pieces_are_refused() {
        let mut file = tiny_model();
        file.extend(piece("<unk2>", 0.0, 2));
        let error = SentencePieceModel::parse(&file).expect_err("one unknown piece is the rule");
        assert!(matches!(error, SentencePieceError::Unknown { count: 2 }));
    }
}
