//! Which factors, batches and sizes the card is given.

use super::*;

fn factors(rank: usize, scale: f32, first: f32) -> Factors {
    let values = |count: usize| (0..count).map(|i| first + i as f32).collect();
    Factors {
        path: "layer".to_owned(),
        rank,
        scale,
        a: values(3 * rank),
        b: values(2 * rank),
    }
}

#[test]
fn several_factors_on_a_layer_are_one_of_their_joint_rank() {
    let given = [factors(1, 2.0, 1.0), factors(2, 0.5, 10.0)];
    let [joint] = &merged(&given)[..] else {
        panic!("one layer");
    };
    assert_eq!((joint.rank, joint.scale), (3, 1.0));
    // B·A of the joint is the sum of scale·B·A.
    let product = |f: &LoraFactors, row: usize, column: usize| -> f32 {
        (0..f.rank)
            .map(|r| f.scale * f.b[row * f.rank + r] * f.a[3 * r + column])
            .sum()
    };
    for row in 0..2 {
        for column in 0..3 {
            let apart: f32 = given
                .iter()
                .map(|one| product(&merged(std::slice::from_ref(one))[0], row, column))
                .sum();
            assert_eq!(product(joint, row, column), apart);
        }
    }
}

fn batch(samples: usize, cells: usize) -> MicroBatch {
    let point = flow_matching::TrainingPoint {
        index: 0,
        sigma: 0.5,
        timestep: 500.0,
        weight: 1.0,
    };
    MicroBatch {
        shape: [samples, 1, cells, cells],
        model_input: vec![1.0; samples * cells * cells],
        noise: vec![2.0; samples * cells * cells],
        points: vec![point; samples],
        text_shape: [3, 2],
        prompt_embeds: vec![3.0; samples * 6],
        pooled: vec![4.0; samples],
    }
}

#[test]
fn every_sample_has_its_numbers() {
    let batch = batch(3, 4);
    let numbers = PerSample::of(&batch, Some(1.5));
    let view = numbers.with(&batch);
    assert_eq!((view.shape.b, view.shape.text), (3, 3));
    assert_eq!((view.latents.len(), view.text.len()), (48, 18));
    assert_eq!(view.sigmas, [0.5; 3]);
    assert_eq!(view.guidance, Some([1.5; 3].as_slice()));
    assert_eq!(PerSample::of(&batch, None).with(&batch).guidance, None);
}

#[test]
fn positions_tell_the_picture() {
    let mut positions = mmdit::text_ids(5);
    positions.extend(mmdit::image_ids(4, 6));
    let shape = shape_of(2, 6, &positions);
    assert_eq!((shape.b, shape.text, shape.latent_cells), (2, 5, [4, 6]));
}

#[test]
#[should_panic(expected = "no whole picture")]
fn positions_of_half_a_picture_are_refused() {
    let mut positions = mmdit::text_ids(1);
    positions.extend(mmdit::image_ids(4, 4));
    positions.swap(1, 2);
    shape_of(1, 4, &positions);
}
