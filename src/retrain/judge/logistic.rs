//! Weighted logistic regression of targets between 0 and 1 on one variable.
//!
//! Convex, so there is one minimum. Newton's method with a halved step finds it to rounding; where it
//! does not, the answer is none, never a wrong line.

/// Newton's method needs about ten steps; more means that something is wrong.
pub(super) const MAX_STEPS: usize = 100;

/// Of the gradient, whose weights sum to one.
const TOLERANCE: f64 = 1e-10;

/// What is fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parameters {
    /// The line goes through zero.
    Slope,
    /// Both.
    SlopeAndIntercept,
}

/// What is to be fitted to.
pub(super) struct Regression {
    /// Variable, target, share of the weight.
    rows: Vec<[f64; 3]>,
    prior: f64,
}

/// Loss, gradient and Hessian at a point.
struct At {
    loss: f64,
    gradient: [f64; 2],
    hessian: [f64; 3],
}

impl At {
    /// Relative to the variable's own size, whatever unit they come in.
    fn gradient_is_below(&self, tolerance: f64) -> bool {
        let scale = self.hessian[0].sqrt().max(1.0);
        self.gradient[0].abs() <= tolerance * scale && self.gradient[1].abs() <= tolerance
    }

    /// The Newton step.
    fn direction(&self) -> [f64; 2] {
        let ([g1, g2], [h11, h12, h22]) = (self.gradient, self.hessian);
        // The ridge of Lin, Lin and Weng: a flat direction gets a bounded step.
        let [h11, h22] = [h11 + 1e-12 * h11.max(1.0), h22 + 1e-12];
        let determinant = h11 * h22 - h12 * h12;
        [
            -(h22 * g1 - h12 * g2) / determinant,
            -(h11 * g2 - h12 * g1) / determinant,
        ]
    }
}

impl Regression {
    /// Rows of variable, target and weight, the weights of any unit above zero; `prior` is the log-odds
    /// that the intercept begins with.
    pub(super) fn new(rows: impl Iterator<Item = [f64; 3]>, prior: f64) -> Self {
        let mut rows: Vec<[f64; 3]> = rows.collect();
        let total: f64 = rows.iter().map(|[_, _, weight]| weight).sum();
        rows.iter_mut().for_each(|[_, _, weight]| *weight /= total);
        Self { rows, prior }
    }

    /// Slope and intercept of least loss.
    pub(super) fn minimise(&self, parameters: Parameters) -> Option<[f64; 2]> {
        let mut point = match parameters {
            Parameters::Slope => [0.0, 0.0],
            Parameters::SlopeAndIntercept => [0.0, self.prior],
        };
        let mut here = self.at(point, parameters);
        for _ in 0..MAX_STEPS {
            if here.gradient_is_below(TOLERANCE) {
                return Some(point);
            }
            let direction = here.direction();
            let fall = here.gradient[0] * direction[0] + here.gradient[1] * direction[1];
            // Near the minimum the fall drowns in the rounding of the loss; the full step is then right.
            let rounding = 1e-14 * (1.0 + here.loss);
            let mut step = 1.0;
            loop {
                let next = [point[0] + step * direction[0], point[1] + step * direction[1]];
                let there = self.at(next, parameters);
                if there.loss <= here.loss + 1e-4 * step * fall + rounding {
                    (point, here) = (next, there);
                    break;
                }
                step /= 2.0;
                if step < 1e-10 {
                    return None;
                }
            }
        }
        None
    }

    fn at(&self, [slope, intercept]: [f64; 2], parameters: Parameters) -> At {
        let mut at = At {
            loss: 0.0,
            gradient: [0.0; 2],
            hessian: [0.0; 3],
        };
        for &[x, target, share] in &self.rows {
            let z = slope * x + intercept;
            at.loss += share * (softplus(z) - target * z);
            let probability = (-softplus(-z)).exp();
            let (error, curvature) = (
                share * (probability - target),
                share * probability * (-softplus(z)).exp(),
            );
            at.gradient[0] += error * x;
            at.gradient[1] += error;
            at.hessian[0] += curvature * x * x;
            at.hessian[1] += curvature * x;
            at.hessian[2] += curvature;
        }
        if parameters == Parameters::Slope {
            (at.gradient[1], at.hessian[1], at.hessian[2]) = (0.0, 0.0, 1.0);
        }
        at
    }
}

/// `log(1 + e^x)` without overflow.
pub(super) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
