//! Images as this system means them: what a file's pixels are, which image it is, how it gets onto the canvas.
//!
//! - [`decode`] turns untrusted bytes into straight RGBA8 pixels, turned upright ([`Orientation`]).
//! - [`identity`] names an image by its pixels; [`PilImage`] carries the public recipe's hash.
//! - [`place_on_canvas`] keeps the sprite grid; [`resize_bilinear`] is the public recipe's way, bit for bit.
//! - [`contact_sheet`] and the PNG text chunks ([`encode_png_rgb`], [`read_png_text`]) show results.
//!
//! No table, no weight and no tensor library is known here.

#![forbid(unsafe_code)]

mod picture;

mod orientation;

mod decode;
mod identity;
mod pil;

mod jpeg;
mod png_source;

mod canvas;
mod model_range;
mod resize;

mod png_text;
mod sheet;

pub use canvas::{CanvasError, CanvasGrid, Placed, canvas_grid, place_at, place_on_canvas};
pub use decode::{DecodeError, Decoded, Limits, SourceError, decode, decode_expecting};
pub use identity::{count_colors, identity};
pub use jpeg::JpegError;
pub use model_range::{from_model_range, to_model_range};
pub use orientation::Orientation;
pub use picture::{Rgb8, Rgba8, half_to_even};
pub use pil::{PilImage, PilMode};
pub use png_text::{PngTextError, encode_png_rgb, encode_png_rgba, read_png_text};
pub use resize::{resize_bilinear, resize_short_side};
pub use sheet::{SheetEntry, SheetStyle, contact_sheet};
