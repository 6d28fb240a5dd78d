//! `metadata.jsonl` and `metadata.csv`: one line per image, its path in `file_name`, its caption in a column that the
//! recipe names.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::SourceRecipe;
use crate::error::{MetadataProblem, SourceError};
use crate::problem::{CAPTION_NOT_TEXT, MISSING_CAPTION, Problem};

const FILE_NAME: &str = "file_name";

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// Counted from 1.
    pub number: u64,
    /// As written.
    pub file_name: String,
    pub caption: Result<String, Problem>,
}

/// Reads either kind, told apart by the ending.
pub(crate) fn read(path: &Path, recipe: &SourceRecipe<'_>) -> Result<Vec<Line>, SourceError> {
    let caption_column = recipe.caption_column;
    let failed = |line, source| SourceError::Metadata {
        path: path.to_path_buf(),
        line,
        source,
    };
    let bytes = fs_err::read(path).map_err(|e| failed(None, MetadataProblem::Read(e)))?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let is_csv = path.extension().is_some_and(|ending| ending == "csv");
    let (lines, columns) = if is_csv {
        read_csv(bytes, caption_column)
    } else {
        read_jsonl(bytes, caption_column)
    }
    .map_err(|(line, problem)| failed(line, problem))?;
    if !lines.is_empty() && !columns.contains(caption_column) {
        return Err(SourceError::NoCaptionColumn {
            keys: recipe.keys,
            path: path.to_path_buf(),
            column: caption_column.to_owned(),
            existing: columns.into_iter().collect(),
        });
    }
    Ok(lines)
}

/// Lines, and the names of all columns seen; or the line's number and what is wrong with it.
type Read = Result<(Vec<Line>, BTreeSet<String>), (Option<u64>, MetadataProblem)>;

fn read_jsonl(bytes: &[u8], caption_column: &str) -> Read {
    let mut lines = Vec::new();
    let mut columns = BTreeSet::new();
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let mut object: Map<String, Value> = serde_json::from_slice(line)
            .map_err(|error| (Some(number), MetadataProblem::Json(error)))?;
        let existing: Vec<String> = object.keys().cloned().collect();
        let caption = match object.remove(caption_column) {
            None | Some(Value::Null) => Err(missing(caption_column, number)),
            Some(Value::String(caption)) => Ok(caption),
            Some(other) => Err(Problem::new(
                CAPTION_NOT_TEXT,
                format!(
                    "{caption_column:?} in line {number} of the metadata is {}, not text",
                    kind(&other)
                ),
            )),
        };
        let Some(Value::String(file_name)) = object.remove(FILE_NAME) else {
            return Err((Some(number), MetadataProblem::NoFileName { existing }));
        };
        columns.extend(existing);
        lines.push(Line {
            number,
            file_name,
            caption,
        });
    }
    Ok((lines, columns))
}

fn read_csv(bytes: &[u8], caption_column: &str) -> Read {
    let failed = |error: csv::Error| {
        let line = error.position().map(csv::Position::line);
        (line, MetadataProblem::Csv(error))
    };
    check_quotes(bytes).map_err(|(line, problem)| (Some(line), problem))?;
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(bytes);
    let columns: Vec<String> = reader
        .headers()
        .map_err(failed)?
        .iter()
        .map(|name| name.trim().to_owned())
        .collect();
    let place = |name: &str| columns.iter().position(|column| column == name);
    let Some(file_name_at) = place(FILE_NAME) else {
        return Err((Some(1), MetadataProblem::NoFileName { existing: columns }));
    };
    let caption_at = place(caption_column);
    let mut lines = Vec::new();
    for record in reader.records() {
        let record = record.map_err(failed)?;
        let number = record.position().map_or(0, csv::Position::line);
        // Spreadsheets write empty rows as commas.
        if record.iter().all(|cell| cell.trim().is_empty()) {
            continue;
        }
        if record.len() != columns.len() {
            let problem = MetadataProblem::Cells {
                expected: columns.len(),
                found: record.len(),
            };
            return Err((Some(number), problem));
        }
        let file_name = record.get(file_name_at).unwrap_or_default().to_owned();
        if file_name.is_empty() {
            return Err((
                Some(number),
                MetadataProblem::NoFileName { existing: columns },
            ));
        }
        lines.push(Line {
            number,
            file_name,
            caption: caption_at
                .and_then(|at| record.get(at))
                .map(str::to_owned)
                .ok_or_else(|| missing(caption_column, number)),
        });
    }
    Ok((lines, columns.into_iter().collect()))
}

/// A quoted cell ends where its quote closes (RFC 4180). The `csv` crate reads on, to the next quote or the file's end:
/// one that was forgotten would put the rows behind it into its caption.
fn check_quotes(bytes: &[u8]) -> Result<(), (u64, MetadataProblem)> {
    let mut line = 1;
    let mut rest = bytes.iter().copied().peekable();
    let mut starts_cell = true;
    while let Some(byte) = rest.next() {
        if byte == b'"' && starts_cell {
            let opened = line;
            loop {
                match rest.next() {
                    None => return Err((opened, MetadataProblem::OpenQuote)),
                    Some(b'\n') => line += 1,
                    Some(b'"') if rest.next_if_eq(&b'"').is_none() => break,
                    Some(_) => {}
                }
            }
            if !matches!(rest.peek(), None | Some(b',' | b'\r' | b'\n')) {
                return Err((opened, MetadataProblem::BehindQuote));
            }
        }
        starts_cell = matches!(byte, b',' | b'\r' | b'\n');
        line += u64::from(byte == b'\n');
    }
    Ok(())
}

fn missing(caption_column: &str, number: u64) -> Problem {
    Problem::new(
        MISSING_CAPTION,
        format!("line {number} of the metadata has no {caption_column:?}"),
    )
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SourceKeys;

    fn read_text(name: &str, text: &str) -> Result<Vec<Line>, SourceError> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        let recipe = SourceRecipe {
            path: dir.path(),
            image_column: "image",
            caption_column: "text",
            keys: &SourceKeys {
                source: "test.source",
                image_column: "test.image_column",
                caption_column: "test.caption_column",
            },
        };
        read(&path, &recipe)
    }

    fn pairs(lines: Vec<Line>) -> Vec<(String, Option<String>)> {
        lines
            .into_iter()
            .map(|line| (line.file_name, line.caption.ok()))
            .collect()
    }

    #[test]
    fn both_kinds_read_alike() {
        let expected = [
            ("a.png".to_owned(), Some("red, \"big\"".to_owned())),
            ("sub/b.png".to_owned(), Some(String::new())),
        ];
        let jsonl = "\u{feff}{\"file_name\": \"a.png\", \"text\": \"red, \\\"big\\\"\"}\r\n\n\
                     {\"text\": \"\", \"file_name\": \"sub/b.png\", \"more\": 1}";
        let csv = "\u{feff}file_name,more,text\r\na.png,1,\"red, \"\"big\"\"\"\r\nsub/b.png,2,\r\n";
        assert_eq!(
            pairs(read_text("metadata.jsonl", jsonl).expect("readable")),
            expected
        );
        assert_eq!(
            pairs(read_text("metadata.csv", csv).expect("readable")),
            expected
        );
    }

    #[test]
    fn a_caption_that_is_absent_or_no_text_is_that_images_problem() {
        let jsonl = "{\"file_name\": \"a.png\"}\n{\"file_name\": \"b.png\", \"text\": null}\n\
                     {\"file_name\": \"c.png\", \"text\": 3}\n{\"file_name\": \"d.png\", \"text\": \"x\"}";
        let lines = read_text("metadata.jsonl", jsonl).expect("readable");
        let reasons: Vec<_> = lines
            .iter()
            .map(|line| line.caption.as_ref().map_err(|problem| problem.reason))
            .collect();
        assert_eq!(
            reasons,
            [
                Err("missing-caption"),
                Err("missing-caption"),
                Err("caption-not-text"),
                Ok(&"x".to_owned())
            ]
        );
    }

    #[test]
    fn a_damaged_line_is_named_with_its_number() {
        for (name, text, line) in [
            (
                "metadata.jsonl",
                "{\"file_name\": \"a\", \"text\": \"b\"}\n{\"file_name\"",
                2,
            ),
            ("metadata.jsonl", "{\"text\": \"b\"}", 1),
            ("metadata.jsonl", "[1]", 1),
            ("metadata.csv", "file_name,text\na,b\nc,d,e\n", 3),
            ("metadata.csv", "name,text\na,b\n", 1),
            ("metadata.csv", "file_name,text\n,b\n", 2),
            ("metadata.csv", "file_name,text\na,\"b\nc,d\n", 2),
            (
                "metadata.csv",
                "file_name,text\na,b\nb,\"c\nd,\"e\"\nf,g\n",
                3,
            ),
            ("metadata.csv", "file_name,text\n\"a\nb\",\"c\"\"\n", 3),
        ] {
            let error = read_text(name, text).expect_err("damaged");
            assert!(
                error.to_string().ends_with(&format!("{name}, line {line}")),
                "{error}"
            );
        }
    }

    #[test]
    fn empty_rows_are_passed_over_and_quotes_are_those_of_the_standard() {
        let csv = "file_name,text\n,\n a.png,\"two\nlines, \"\"q\"\"\"\r\n  \n\nb.png,5\" tall\n\"c.png\",\"\"";
        assert_eq!(
            pairs(read_text("metadata.csv", csv).expect("readable")),
            [
                (" a.png", "two\nlines, \"q\""),
                ("b.png", "5\" tall"),
                ("c.png", "")
            ]
            .map(|(file, caption)| (file.to_owned(), Some(caption.to_owned())))
        );
    }

    #[test]
    fn a_column_that_no_line_has_is_named_with_those_that_exist() {
        for (name, text) in [
            (
                "metadata.jsonl",
                "{\"file_name\": \"a\", \"caption\": \"b\"}",
            ),
            ("metadata.csv", "file_name,caption\na,b\n"),
        ] {
            let text = read_text(name, text)
                .expect_err("no such column")
                .to_string();
            assert!(text.contains("no column \"text\""), "{text}");
            assert!(text.ends_with("caption, file_name"), "{text}");
        }
    }
}
