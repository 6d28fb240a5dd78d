//! Attention and single products.

use serde_json::{Map, Value, json};

use super::{Outcome, Table, device_ms, open};
use crate::Half;
use crate::gemm::{Matrix, Output, Product};
use crate::ops::attention::{self, AttentionShape, Strided};

pub(super) fn attention_rows(table: &mut Table) -> Outcome {
    let stream = open()?;
    let (h, dh) = (24, 128);
    for n in [1536, 4608] {
        for t in [Half::Bf16, Half::F16] {
            let d = h * dh;
            let buffers = (0..8)
                .map(|_| stream.allocate(2 * n * d, "attention"))
                .collect::<Outcome<Vec<_>>>()?;
            for (i, buffer) in buffers.iter().enumerate() {
                let (view, seed) = (buffer.view(), i as u64);
                crate::ops::elementwise::fill_normal(&stream, t, view, n * d, seed, 1.0)?;
            }
            let lse = stream.allocate(4 * h * n, "attention")?;
            let strided = |i: usize| Strided {
                view: buffers[i].view(),
                token: d,
                head: dh,
                batch: n * d,
            };
            let shape = AttentionShape {
                b: 1,
                h,
                n,
                dh,
                scale: (dh as f32).sqrt().recip(),
            };
            let scratch =
                stream.allocate(attention::backward_scratch_bytes(&shape), "attention")?;
            let [q, k, v, o, d_o, dq, dk, dv] = std::array::from_fn(strided);
            let forward = || attention::forward(&stream, t, o, lse.view(), q, k, v, shape);
            let backward = || {
                let (lse, scratch) = (lse.view(), scratch.view());
                attention::backward(&stream, t, dq, dk, dv, d_o, o, lse, q, k, v, scratch, shape)
            };
            let flops = 4.0 * (h * dh) as f64 * (n as f64).powi(2);
            let forward_ms = device_ms(&stream, 20, forward)?;
            let backward_ms = device_ms(&stream, 20, backward)?;
            table.row(
                &format!("attention_24x{n}x128_{t:?}"),
                json!({
                    "forward_ms": forward_ms,
                    "backward_ms": backward_ms,
                    "forward_tflops": flops / forward_ms / 1e9,
                    "backward_tflops": 2.5 * flops / backward_ms / 1e9,
                }),
            );
        }
    }
    Ok(())
}

pub(super) fn product_rows(table: &mut Table) -> Outcome {
    let stream = open()?;
    let t = Half::Bf16;
    for (m, n, k) in [
        (1536, 21504, 3072),
        (1536, 3072, 15360),
        (1536, 12288, 3072),
        (1024, 9216, 3072),
        (512, 9216, 3072),
        (1024, 3072, 3072),
        (6144, 21504, 3072),
        (6144, 3072, 15360),
        (1536, 16, 3072),
        (1536, 9216, 16),
        (1, 18432, 3072),
    ] {
        let a = stream.allocate(2 * m * k, "A")?;
        let b = stream.allocate(2 * n * k, "B")?;
        let c = stream.allocate(2 * m * n, "C")?;
        for (buffer, count) in [(&a, m * k), (&b, n * k)] {
            let view = buffer.view();
            crate::ops::elementwise::fill_normal(&stream, t, view, count, 1, 1.0)?;
        }
        let mut row = Map::new();
        for (name, b_matrix) in [
            ("forward", Matrix::transposed(b.view(), k)),
            ("backward", Matrix::rows(b.view(), n)),
        ] {
            let product = Product {
                m,
                n,
                k,
                a: Matrix::rows(a.view(), k),
                b: b_matrix,
                c: c.view(),
                c_stride: n,
                output: Output::Half,
                alpha: 1.0,
                beta: 0.0,
                bias: None,
            };
            let ms = device_ms(&stream, 20, || stream.product(t, &product))?;
            let tflops = 2.0 * (m * n) as f64 * k as f64 / ms / 1e9;
            row.insert(name.to_owned(), json!({ "ms": ms, "tflops": tflops }));
        }
        table.row(&format!("product_{m}x{n}x{k}"), Value::Object(row));
    }
    Ok(())
}
