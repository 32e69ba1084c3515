package buildindex

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// extended serves the extension of a build-index, and returns a client of it.
func (r *rig) extended() *cluster.IndexClient {
	r.Helper()
	r.must(r.x.takeOver(r.Context()))
	serve, err := r.x.extension()
	if err != nil {
		r.Fatal(err)
	}
	srv := httptest.NewServer(registry.Server{Dialect: cluster.Dialect(), Extension: serve}.Handler())
	r.Cleanup(srv.Close)
	c, err := cluster.NewIndexClient(srv.URL, srv.Client())
	if err != nil {
		r.Fatal(err)
	}
	return c
}

// Each robot that is put is another, whatever whoever puts it says of itself, and of the time.
func TestRobotsAreTold(t *testing.T) {
	r := newRig(t)
	c := r.extended()
	seen := map[string]bool{}
	for range 3 {
		b := cluster.Robot{Name: "ci", Hash: strings.Repeat("a", 64), Created: time.Now().Add(time.Hour), Expires: time.Now().Add(24 * time.Hour), Generation: "mine"}
		r.must(c.PutRobot(t.Context(), b))
		s, err := c.Access(t.Context())
		if err != nil || len(s.Robots) != 1 {
			t.Fatalf("%+v, %v", s, err)
		}
		if got := s.Robots[0]; seen[got.Generation] || len(got.Generation) < 20 || got.Created.After(time.Now()) {
			t.Errorf("a robot is %+v", got)
		}
		seen[s.Robots[0].Generation] = true
	}
}
