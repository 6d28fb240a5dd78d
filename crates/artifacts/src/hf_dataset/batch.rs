//! Rows that were decoded together, as the decoder left them: values that rows share are there once.

use polars_arrow::array::{
    Array, BinaryViewArray, BinaryViewArrayGeneric, StructArray, Utf8ViewArray, ViewType,
};

use super::ParquetImage;

/// Rows of one file that follow each other.
pub(super) struct Batch {
    file: usize,
    first_row: u32,
    images: Vec<ImageColumns>,
    /// As many rows as there are images, or none if captions are not read.
    captions: Vec<Utf8ViewArray>,
}

impl Batch {
    /// Arrays of an image column, each behind the one before, and of its captions. `None` if they are not of the types
    /// that were promised.
    pub fn new(
        file: usize,
        first_row: u32,
        images: Vec<Box<dyn Array>>,
        captions: Vec<Utf8ViewArray>,
    ) -> Option<Self> {
        let images = images.iter().map(|array| ImageColumns::of(array.as_ref()));
        Some(Self {
            file,
            first_row,
            images: images.collect::<Option<_>>()?,
            captions,
        })
    }

    /// Whether a row of the file is here.
    pub fn has(&self, row: u32) -> bool {
        let place = row.checked_sub(self.first_row);
        place.is_some_and(|place| self.image_of(place as usize).is_some())
    }

    /// A row of the file, if it is here.
    pub fn get(&self, row: u32) -> Option<ParquetImage> {
        let place = row.checked_sub(self.first_row)? as usize;
        let (images, index) = self.image_of(place)?;
        let caption = find(&self.captions, place, |captions| captions.len())
            .and_then(|(captions, index)| captions.get(index));
        Some(ParquetImage {
            file: self.file,
            row,
            bytes: images.bytes(index).unwrap_or_default().to_vec(),
            path: images.path(index).map(str::to_owned),
            caption: caption.map(str::to_owned),
        })
    }

    fn image_of(&self, place: usize) -> Option<(&ImageColumns, usize)> {
        find(&self.images, place, |images| images.images.len())
    }

    /// All rows, copied one by one.
    pub fn into_rows(self) -> impl Iterator<Item = ParquetImage> {
        (self.first_row..).map_while(move |row| self.get(row))
    }

    /// Which of the files it is of.
    pub fn file(&self) -> usize {
        self.file
    }

    /// What it occupies, in bytes.
    pub fn num_bytes(&self) -> usize {
        let images = self.images.iter().map(ImageColumns::num_bytes);
        images.chain(self.captions.iter().map(num_bytes)).sum()
    }
}

/// The array that has an element, and its place in it.
fn find<A>(arrays: &[A], mut place: usize, len: impl Fn(&A) -> usize) -> Option<(&A, usize)> {
    for array in arrays {
        if place < len(array) {
            return Some((array, place));
        }
        place -= len(array);
    }
    None
}

/// What an array occupies: its values once, and a view of one for each element.
fn num_bytes<V: ViewType + ?Sized>(array: &BinaryViewArrayGeneric<V>) -> usize {
    array.total_buffer_len() + size_of_val(array.views().as_slice())
}

/// The arrays behind a decoded image column.
struct ImageColumns {
    images: Box<dyn Array>,
    bytes: BinaryViewArray,
    path: Option<Utf8ViewArray>,
}

impl ImageColumns {
    fn of(images: &dyn Array) -> Option<Self> {
        let Some(structs) = images.as_any().downcast_ref::<StructArray>() else {
            let bytes: &BinaryViewArray = images.as_any().downcast_ref()?;
            return Some(Self {
                images: images.to_boxed(),
                bytes: bytes.clone(),
                path: None,
            });
        };
        let child = |name: &str| {
            let place = structs
                .fields()
                .iter()
                .position(|field| field.name.as_str() == name)?;
            Some(structs.values()[place].as_any())
        };
        let bytes: &BinaryViewArray = child("bytes")?.downcast_ref()?;
        let path: Option<&Utf8ViewArray> = child("path").and_then(|path| path.downcast_ref());
        Some(Self {
            images: images.to_boxed(),
            bytes: bytes.clone(),
            path: path.cloned(),
        })
    }

    fn bytes(&self, index: usize) -> Option<&[u8]> {
        (self.images.is_valid(index) && self.bytes.is_valid(index)).then(|| self.bytes.value(index))
    }

    fn path(&self, index: usize) -> Option<&str> {
        let path = self.path.as_ref()?;
        (self.images.is_valid(index) && path.is_valid(index)).then(|| path.value(index))
    }

    fn num_bytes(&self) -> usize {
        num_bytes(&self.bytes) + self.path.as_ref().map_or(0, num_bytes)
    }
}
