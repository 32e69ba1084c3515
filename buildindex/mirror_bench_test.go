package buildindex

import (
	"testing"

	"kraken/proto/registry"
	script "kraken/test/upstream"
)

// A tag of an upstream that was asked about lately.
func BenchmarkMirroredTag(b *testing.B) {
	u := script.New(b, script.Options{})
	u.PutImage("library/app", "v1", []byte("layer"))
	r := newMirrorRig(b, mirrored(u))
	repo, ref := u.Alias+"/library/app", registry.Reference{Tag: "v1"}
	for b.Loop() {
		if _, err := r.x.GetManifest(b.Context(), repo, ref, registry.GetOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(u.Count("", "")), "requests")
}
