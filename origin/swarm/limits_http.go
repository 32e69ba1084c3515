package swarm

import (
	"encoding/json"
	"fmt"
	"net/http"
)

// AdminRoutes adds what operators may do to m, which must be out of the reach of others:
//
//	GET /limits  the rates as they are now
//	PUT /limits  changes those that the body names, e.g. {"upload_rate": "25Mbit/s"}, until the process ends
func (s *Swarm) AdminRoutes(m *http.ServeMux) {
	m.HandleFunc("GET /limits", func(w http.ResponseWriter, _ *http.Request) { s.sendRates(w) })
	m.HandleFunc("PUT /limits", func(w http.ResponseWriter, r *http.Request) {
		if err := s.changeRates(w, r); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		s.sendRates(w)
	})
}

func (s *Swarm) changeRates(w http.ResponseWriter, r *http.Request) error {
	s.ratesMu.Lock()
	defer s.ratesMu.Unlock()
	rates := s.Rates()
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<10))
	d.DisallowUnknownFields()
	if err := d.Decode(&rates); err != nil {
		return fmt.Errorf("limits: %w", err)
	}
	if err := rates.Validate(); err != nil {
		return err
	}
	s.limits.set(rates)
	s.log.Info("rates were changed by an operator", "upload", rates.UploadRate, "download", rates.DownloadRate,
		"blob_upload", rates.BlobUploadRate, "blob_download", rates.BlobDownloadRate)
	return nil
}

func (s *Swarm) sendRates(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(s.Rates()); err != nil {
		s.log.Debug("client went away", "error", err)
	}
}
