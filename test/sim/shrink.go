package sim

import "slices"

// Shrink returns the result of a smaller plan that finds the same kind of violation, in at most so many runs. Whether
// a plan fails may depend on how goroutines are scheduled: what fails one time in some is given up when it does not
// fail at once.
func Shrink(r Result, runs int, run func(Plan) Result) Result {
	kind := r.Violations[0].Kind
	fails := func(p Plan) bool {
		if runs--; runs < 0 {
			return false
		}
		next := run(p)
		if !slices.ContainsFunc(next.Violations, func(v Violation) bool { return v.Kind == kind }) {
			return false
		}
		r = next
		return true
	}
	// Whole epochs first, then halves, quarters and so on of the steps of each.
	for i := 0; i < len(r.Plan.Epochs); {
		p := r.Plan
		p.Epochs = slices.Delete(slices.Clone(p.Epochs), i, i+1)
		if len(p.Epochs) == 0 || !fails(p) {
			i++
		}
	}
	for i := range r.Plan.Epochs {
		for size := (len(r.Plan.Epochs[i]) + 1) / 2; size > 0 && runs > 0; size /= 2 {
			for at := 0; at < len(r.Plan.Epochs[i]) && runs > 0; {
				p := r.Plan
				p.Epochs = slices.Clone(p.Epochs)
				p.Epochs[i] = slices.Delete(slices.Clone(p.Epochs[i]), at, min(at+size, len(p.Epochs[i])))
				if !fails(p) {
					at += size
				}
			}
		}
	}
	return r
}
